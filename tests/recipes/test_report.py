"""recipes/report.py: the words and tables say what the records do, and README.md what the command would write."""

import json
import math
import re

import pytest
from imagenet import RECIPES, load_recipe

ROOT = RECIPES.parent


@pytest.fixture
def report():
    return load_recipe(RECIPES / "report.py")


def runs(method, top1, protocol="images", gradients=10.0):
    common = {"kind": "run", "protocol": protocol, "method": method, "gradients": gradients, "seconds": 3.0}
    task = {"data_dir": "cifar10", "train_images": 3000, "label_noise": 0.3, "model": "test_resnet", "epochs": 10}
    common |= {
        "task": task,
        "settings": {"lr": 0.1, "weight_decay": 5e-4, "strength": None},
        "images": {"evaluated": 9},
    }
    common |= {"hardware": {"device": "x86_64", "threads": 1}, "versions": {"torch": "2.14"}}
    common |= {"load_average": 1.0}
    history = [{"train_loss": 0.1, "epoch": 10.0, "seconds": 3.0, "gradients": gradients}]
    return [
        common | {"seed": seed, "top1": value, "history": [row | {"top1": value} for row in history]}
        for seed, value in enumerate(top1)
    ]


def test_a_difference_is_one_beyond_its_interval(report):
    base = runs("base", [0.50, 0.51, 0.52])
    # By hand: differences 1, 2, 3 points; mean 2, sd 1, t(0.975, 2) = 4.303, margin 4.303 / sqrt(3) = 2.48.
    kind, gain = report.verdict(runs("rwp", [0.51, 0.53, 0.55]), base)
    assert kind == "not to be told apart"
    assert [gain.mean, gain.low, gain.high] == pytest.approx([2, -0.484, 4.484], abs=1e-3)
    assert report.verdict(runs("rwp", [0.53, 0.54, 0.551]), base)[0] == "better"
    assert report.verdict(runs("rwp", [0.40, 0.41, 0.421]), base)[0] == "worse"
    assert report.verdict(runs("rwp", [0.9, 0.9]), base) == ("not to be told apart", None)


def test_a_task_has_a_sentence(report):
    better = {"base": runs("base", [0.50, 0.51, 0.52]), "rwp": runs("rwp", [0.53, 0.54, 0.551])}
    few = {"base": runs("base", [0.5]), "rwp": runs("rwp", [0.6])}
    assert report.sentence("a", better | {"sam": runs("sam", [0.9, 0.6, 0.6])}) == (
        "a: RWP is better (+3.03, 95 % interval +2.89 to +3.18) than plain, not to be told apart (-15.97, 95 % "
        "interval -61.24 to +29.30) from SAM. The best mean has SAM."
    )
    assert report.sentence("few", few).startswith("few: RWP is not to be told apart from plain.")
    assert "has not been run beside" in report.sentence("alone", {"rwp": runs("rwp", [0.6])})


def test_a_summary_has_a_row_for_each_task_and_terms_and_says_where_rwp_gained(report):
    images = runs("base", [0.50, 0.51, 0.52]) + runs("rwp", [0.53, 0.54, 0.551]) + runs("sam", [0.9, 0.6, 0.6])
    gradients = runs("base", [0.5, 0.6], "gradients") + runs("rwp", [0.6, 0.65], "gradients")
    alone = [run | {"replicas": 2} for run in runs("arwp", [0.1]) + runs("rwp", [0.1, 0.2])]
    text = report.summary({"small": images + gradients, "other": alone}, [])
    task = "CIFAR-10, test_resnet, 3,000 images, 10 epochs, 30% of labels random"
    assert text.strip().splitlines()[2:] == [
        "| task | terms | seeds | plain | SAM | SAM every 10th step | RWP | RWP, alpha 1 "
        "| RWP over plain | RWP over SAM | RWP over SAM every 10th step |",
        "| " + " | ".join(["---"] * 11) + " |",
        f"| {task} | equal images per step and equal steps | 3 | 51.00 ± 1.00 | 70.00 ± 17.32 |  | 54.03 ± 1.05 |  "
        "| **+3.03** | -15.97 |  |",
        "|  | equal gradient evaluations | 2 | 55.00 ± 7.07 |  |  | 62.50 ± 3.54 |  |  |  |  |",
        f"| {task}, 2 replicas | equal images per step and equal steps | 2 |  |  |  | 15.00 ± 7.07 |  |  |  |  |",
    ]
    assert report.gain_cell(runs("rwp", [0.40, 0.41, 0.421]), runs("base", [0.50, 0.51, 0.52])) == "**-9.97**"
    assert report.gain_cell(runs("rwp", [0.5, 0.6, 0.5]), runs("base", [0.50001, 0.6, 0.5])) == "+0.00"
    assert report.summary({}, []).strip() == ""


def test_the_lines_of_readme_have_costs_model_by_model_and_only_what_was_planned(report):
    base, sam = runs("base", [0.50, 0.51, 0.52]), runs("sam", [0.9, 0.6, 0.6])
    comparisons = {"a": base + sam + runs("rwp", [0.53, 0.54, 0.551]), "b": base + runs("rwp", [0.40, 0.41, 0.421])}
    found = [("RWP step / plain step", "small", 1.02), ("RWP step / plain step", "large", 1.07), ("import", "", 0.1)]
    rows = [{"what": what, "model": model, "median": median} for what, model, median in found]
    hardware = {"device": "x86_64", "replicas": 2, "threads": 1}
    assert report.brief(comparisons, [{"rows": rows, "hardware": hardware}]).splitlines() == [
        "- Costs (2 models on x86_64): RWP step / plain step 1.02 to 1.07.",
    ]
    assert report.brief({}, []) == ""


def test_conditions_say_under_which_terms_the_settings_were_searched(report):
    trials = [record | {"kind": "trial"} for record in runs("base", [0.5]) + runs("base", [0.4], "gradients")]
    both = runs("base", [0.5]) + runs("base", [0.6], "gradients")
    apart = "at equal images per step and equal steps and, apart, at equal gradient evaluations, with one seed. "
    assert apart in report.conditions(trials + both) + " "
    assert "equal steps, with one seed; other protocols use the same." in report.conditions(trials[:1] + both)
    assert report.conditions(both).endswith("Settings were given, not searched.")


def test_costs_have_a_column_a_model_and_say_what_was_missed(report):
    def row(model, what, median, quartiles, limit, at_least=False):
        holds = None if limit is None else median >= limit if at_least else median <= limit
        given = {"model": model, "what": what, "median": median, "quartiles": quartiles}
        clear = None if limit is None else not quartiles[0] <= limit <= quartiles[1]
        return given | {"limit": limit, "at_least": at_least, "holds": holds, "clear": clear}

    rows = [
        row("small", "RWP step / plain step", 1.02, [1.01, 1.03], None),
        row("large", "RWP step / plain step", 1.07, [1.06, 1.08], 1.05),
        row("large", "SAM step / RWP step", 1.95, [1.89, 2.0], 1.9, at_least=True),
        row("", "import", 0.1, [0.1, 0.1], 0.2),
    ]
    assert report.costs(rows).splitlines() == [
        "|  | small | large | any model |",
        "| --- | --- | --- | --- |",
        "| RWP step / plain step | 1.02 (1.01 to 1.03) | 1.07 (1.06 to 1.08); ≤ 1.05 missed |  |",
        "| SAM step / RWP step |  | 1.95 (1.89 to 2); ≥ 1.9 holds, within the spread |  |",
        "| import |  |  | 0.1; ≤ 0.2 holds |",
    ]


def test_the_section_goes_between_its_markers(report):
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.with_section(text, "\nnew\n")
    assert new == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.with_section(new, "\nnew\n") == new
    with pytest.raises(ValueError, match="lacks the markers"):
        report.with_section("no markers", "new")


def test_readme_says_what_the_records_do(report):
    records = report.read_comparisons(report.RESULTS), report.read_benchmarks(report.RESULTS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.with_section(readme, report.brief(*records)) == readme
    assert len(report.brief(*records).splitlines()) <= 5
    full = (report.RESULTS / "README.md").read_text(encoding="utf-8")
    assert report.page(report.RESULTS) == full
    for picture in re.findall(r"\]\(([^)]+\.png)\)", full):
        assert (report.RESULTS / picture).exists()


def test_records_of_comparisons_are_whole(report):
    """Every published run says what RWP did, under which settings, where and from which commit."""
    comparisons = report.read_comparisons(report.RESULTS)
    assert comparisons
    for records in comparisons.values():
        for record in (record for record in records if record["kind"] != "note"):
            assert {"command", "git_commit", "versions", "hardware", "date", "seed", "settings"} <= set(record)
            assert "-dirty" not in record["git_commit"]
            if "rwp" in record["method"]:
                perturbed = record.get("replicas", 1) if record["rwp"]["alpha"] == 1 else 1  # of two replicas or fewer
                perturbed *= 1 + record["options"].get("antithetic", False)
                first = math.ceil(record["options"]["start"] * record["steps"])
                assert record["rwp"]["slots"]["perturbed"] == perturbed * (record["steps"] - first)
                assert record["rwp"]["relative_noise"]["largest"]["size"] > 0
            assert not re.search(r"/(home|root|tmp|work)/", json.dumps(record))


def test_the_command_writes_all_of_it(report, tmp_path, monkeypatch):
    results = tmp_path / "recipes" / "results"
    (results / "compare").mkdir(parents=True)
    lines = [json.dumps(record) for record in runs("base", [0.5, 0.6]) + runs("rwp", [0.6, 0.65])]
    (results / "compare" / "small.jsonl").write_text("\n".join(lines) + "\n")
    planned = [json.dumps(record) for record in runs("base", [0.5] * 8) + runs("rwp", [0.6] * 8)]
    (results / "compare" / "digits_wrong20.jsonl").write_text("\n".join(planned) + "\n")
    (tmp_path / "README.md").write_text(f"# Mine\n{report.BEGIN}\n{report.END}\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", results)
    report.main()
    assert (results / "compare" / "small_images.png").exists()
    assert "| RWP | 62.50 ± 3.54 | +7.50 ± 3.54 | 2 |" in (results / "README.md").read_text()
    assert "| 55.00 ± 7.07 |  |  | 62.50 ± 3.54 |" in (results / "README.md").read_text()
    said = "Other shares of wrong labels, and none (20 % random), points: RWP over plain **+10.0**, p 0.0078."
    assert said in (tmp_path / "README.md").read_text()
