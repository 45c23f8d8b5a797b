"""README.md: one page whose blocks run as they stand, whose links lead somewhere, with the figures of the records."""

import re
from pathlib import Path

import forked
import pytest
from imagenet import RECIPES, load_recipe

import hf_rwp
from hf_rwp.experiments.claims import outcomes

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
PAGES = ["README.md", "recipes/README.md", "recipes/results/README.md", "hf_rwp/README.md"]


def test_it_is_one_page():
    assert len(TEXT.splitlines()) <= 90
    assert len(TEXT.split()) <= 900


def test_the_first_screen_says_what_it_is_for_and_shows_one_picture():
    screen = TEXT.partition("\n## ")[0]
    assert len(screen.splitlines()) <= 24
    assert "**Use it**" in screen
    assert "**Expect no gain**" in screen
    assert TEXT.count("![") == screen.count("![") == 1


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_as_it_stands(number, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(BLOCKS[number] + "print(torch.initial_seed())\n")
    run = forked.run(script, cwd=tmp_path, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_there_is_a_block_for_a_loop_and_one_for_trainer():
    loop, trainer = BLOCKS
    assert "from hf_rwp import RWP\n" in loop
    assert "RWPTrainer(" in trainer


def test_the_loop_of_the_block_takes_both_gradients(monkeypatch):
    names = {}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    assert names["rwp"].report()["slots"] == {"clean": 4, "perturbed": 4}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            linked = (ROOT / page).parent / path if path else ROOT / page
            assert linked.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def planned():
    return outcomes(load_recipe(RECIPES / "report.py").read_comparisons(RECIPES / "results"))


def test_the_words_beside_the_picture_are_those_of_its_runs():
    report = load_recipe(RECIPES / "report.py")
    picture = re.search(r"!\[.*\]\(recipes/results/compare/(\w+)_images\.png\)", TEXT)[1]
    records = report.read_comparisons(report.RESULTS)[picture]
    runs = report.by_method(report.by_protocol(records)["images"])
    caption = TEXT.partition("_images.png)\n")[2].partition("\n## ")[0].replace("\n", " ")
    found = {(one.claim.ours, one.claim.theirs): one for one in planned() if one.claim.file == picture}
    plain, sam, unmixed = (found["rwp", rival] for rival in ("base", "sam", "rwp_unmixed"))
    assert [one.verdict for one in (plain, sam, unmixed)] == ["no effect", "worse", "better"]
    assert f"RWP ends at {plain.ours:.1f} %, plain training at {plain.theirs:.1f} % (p {plain.p:.2g})" in caption
    assert f"SAM at {sam.theirs:.1f} % (p {sam.p:.2g} against RWP)" in caption
    assert f"ends at {unmixed.theirs:.1f} % (p {unmixed.p:.2g})" in caption
    assert runs["sam"][0]["gradients"] == pytest.approx(2 * runs["rwp"][0]["gradients"], rel=0.01)
    seconds = {name: sum(run["seconds"] for run in mine) for name, mine in runs.items()}
    assert seconds["sam"] > 2 * seconds["rwp"]
    assert {len(mine) for mine in runs.values()} == {8}  # "eight seeds"
    task = records[0]["task"]
    assert (task["train_images"], task["label_noise"], task["epochs"], task["model"]) == (1000, 0.3, 60, "test_resnet")
    assert {run["replicas"] for run in runs["rwp"]} == {1}


def test_what_to_expect_is_what_the_plans_found():
    accuracies = [one for one in planned() if one.claim.figure == "top1" and one.claim.rivals is None]
    over_plain = [one for one in accuracies if (one.claim.ours, one.claim.theirs) == ("rwp", "base")]
    assert [one.verdict for one in over_plain] == ["no effect"] * 11
    gains = [one.gain for one in accuracies if one.claim.ours == "sam" and one.verdict == "better"]
    text = TEXT.replace("\n", " ").replace("  ", " ")
    assert "on eleven planned tasks RWP could not be told from plain training tuned as far" in text
    assert "SAM gained {:.1f} and {:.1f} points".format(*sorted(gains)) in text


def test_steps_cost_about_what_the_page_says():
    report = load_recipe(RECIPES / "report.py")
    assert "a step costs about what a plain one does" in TEXT.replace("\n", " ")
    for record in report.read_benchmarks(report.RESULTS):
        for row in report.step_rows(record):
            if not row["what"].startswith("SAM"):
                assert row["median"] <= (row["limit"] or 1.1)  # 1.2 for the small one at 32 pixels


def test_the_changelog_has_this_version():
    assert f"\n## {hf_rwp.__version__}" in (ROOT / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
