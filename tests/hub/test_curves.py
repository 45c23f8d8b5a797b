"""`hf-rwp curves`: which runs it lays over one another, what it calls them, and what it refuses."""

import json
from pathlib import Path

import PIL.Image
import pytest

from hf_rwp.analysis import run_plots
from hf_rwp.cli import main as hf_rwp

ROOT = Path(__file__).parents[2]
DIGITS, COMPARED = ROOT / "recipes/results/digits.jsonl", ROOT / "recipes/results/compare/digits16.jsonl"


def results(method="rwp", gamma=0.01, images=360, **changed):
    final = {"rwp": {"gamma": gamma, "alpha": 0.5}} if method == "rwp" else {}
    history = [{"epoch": e, "train_loss": 1 / e, "eval_loss": 2 / e, "top1": 1 - 0.5 / e} for e in (1, 2, 3)]
    made = {
        "arguments": {"method": method, "dataset": None, "data_dir": None, "sam_rho": 0.05},
        "model": {"name": "test_resnet"},
        "data": {"validation": {"images": images}},
        "final": history[-1] | final,
        "history": history,
    }
    return made | changed


def write(folder, made):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(made))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The runs that are drawn, by their names."""
    seen = {}
    draw = run_plots.overlaid_curves

    def watched(runs, path, kind=None):
        seen.clear()
        seen.update(runs)
        draw(runs, path, kind)

    monkeypatch.setattr(run_plots, "overlaid_curves", watched)
    return seen


@pytest.fixture
def refused(capsys, tmp_path):
    """What is said of runs that are refused, in one line, without a picture."""

    def said(*runs):
        picture = tmp_path / "none.png"
        with pytest.raises(SystemExit) as stopped:
            hf_rwp(["curves", *map(str, runs), "--output", str(picture)])
        assert stopped.value.code == 2
        assert not picture.exists()
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
        return err

    return said


def test_runs_are_drawn_under_their_folders_and_methods(drawn, capsys, tmp_path):
    runs = [
        write(tmp_path / "digits_rwp", results()),
        write(tmp_path / "digits_sam", results("sam")),
        write(tmp_path / "digits_base", results("base")),
    ]
    hf_rwp(["curves", *map(str, runs), str(runs[0]), "--output", str(tmp_path / "new" / "curves.png")])
    assert list(drawn) == [
        "digits_rwp: test_resnet, RWP, gamma 0.01, alpha 0.5",
        "digits_sam: test_resnet, SAM, rho 0.05",
        "digits_base: test_resnet, plain training",
    ]
    assert all(history == results()["history"] for history in drawn.values())
    with PIL.Image.open(tmp_path / "new" / "curves.png") as picture:
        assert picture.format == "PNG"
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split("  ")[-1] == "run"
    assert rows[1].split()[:5] == ["3", "83.33%", "83.33%", "0.6667", "0.3333"]
    assert rows[1].endswith("  digits_rwp: test_resnet, RWP, gamma 0.01, alpha 0.5")
    assert rows[-1] == f"Wrote {tmp_path / 'new' / 'curves.png'}"


def test_as_much_of_a_path_is_shown_as_tells_runs_apart(drawn, tmp_path):
    places = ["one/model", "two/model", "two/1", "two/2"]
    runs = [write(tmp_path / place, results(gamma=0.1 if place == "two/2" else 0.01)) for place in places]
    hf_rwp(["curves", *map(str, runs), str(runs[0] / "results.json"), "--output", str(tmp_path / "curves.svg")])
    assert [name.split(": ")[0] for name in drawn] == ["one/model", "two/model", "two/1", "two/2"]
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_a_later_run_of_a_name_has_the_name_before_its_number(drawn, tmp_path):
    runs = [write(tmp_path / name, results()) for name in ("digits", "digits/2")]
    hf_rwp(["curves", *map(str, runs), "--output", str(tmp_path / "curves.png")])
    assert [name.partition(":")[0] for name in drawn] == ["digits", "digits/2"]


def test_a_run_that_was_moved_is_found_by_a_relative_path(drawn, monkeypatch, tmp_path):
    write(tmp_path / "digits", results())
    monkeypatch.chdir(tmp_path / "digits")
    hf_rwp(["curves", "."])
    assert next(iter(drawn)).startswith("digits: ")
    assert (tmp_path / "digits" / "outputs" / "curves.png").is_file()  # and not over the run's own


def test_records_stand_for_their_runs(drawn, tmp_path):
    hf_rwp(["curves", str(DIGITS), "--output", str(tmp_path / "curves.png")])
    (record,) = map(json.loads, DIGITS.read_text().splitlines())
    assert drawn == {"digits: test_resnet, RWP, gamma 0.01, alpha 0.5": record["history"]}


def test_records_of_a_comparison_stand_for_the_means_of_its_methods(drawn, tmp_path):
    hf_rwp(["curves", str(COMPARED), "--output", str(tmp_path / "curves.png")])
    records = [json.loads(line) for line in COMPARED.read_text().splitlines()]
    runs = [record for record in records if record["kind"] == "run"]
    assert len(drawn) == len({(run["protocol"], run["method"]) for run in runs})
    name = "digits16: RWP, gamma 0.02, equal images, 5 seeds"
    mine = [run for run in runs if (run["protocol"], run["method"]) == ("images", "rwp")]
    assert len(mine) == 5
    last = [run["history"][-1]["top1"] for run in mine]
    assert drawn[name][-1]["top1"] == pytest.approx(sum(last) / 5)
    assert "digits16: plain, equal gradients, 5 seeds" in drawn


def test_runs_and_records_of_the_same_data_lie_over_one_another(drawn, tmp_path):
    run = write(tmp_path / "mine", results())
    hf_rwp(["curves", str(run), str(DIGITS), "--output", str(tmp_path / "curves.png")])
    assert len(drawn) == 2


def test_a_run_of_text_has_losses_alone(drawn, capsys, tmp_path):
    history = [{"epoch": 1.0, "train_loss": 2.0, "eval_loss": 3.0}]
    made = {"arguments": {"method": "rwp", "rwp_gamma": 0.05}, "history": history, "final": {}}
    hf_rwp(["curves", str(write(tmp_path / "sums", made)), "--output", str(tmp_path / "curves.png")])
    assert drawn == {"sums: RWP, gamma 0.05": history}
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["1", "-", "-", "3.0000", "2.0000"]


# What it refuses


def test_what_is_no_run_is_named_with_what_to_do(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    write(tmp_path / "outputs" / "a", results())
    assert "does not exist: name the folder of a run" in refused(tmp_path / "gone")
    assert "is not a run, which has a results.json" in refused(tmp_path / "empty")
    assert f"name {tmp_path / 'outputs' / 'a'}" in refused(tmp_path / "outputs")
    assert "has not finished: go on with it, --resume_from_checkpoint" in refused(tmp_path / "unfinished")
    assert "is not JSON" in refused(tmp_path / "picture.png")


@pytest.mark.parametrize("content", ["[1]", "{}", '{"arguments": 3}', "not JSON"])
def test_another_results_json_is_no_run(refused, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    assert "Name the folder of a run" in refused(tmp_path) or "name the folder of a run" in refused(tmp_path)


@pytest.mark.parametrize("history", [[], [{"step": 3}], None])
def test_a_run_without_curves_is_refused(refused, tmp_path, history):
    assert "has no history, of which curves are made" in refused(write(tmp_path / "run", results(history=history)))


@pytest.mark.parametrize(
    "other",
    [
        {"images": 100},
        {"arguments": {"method": "rwp", "dataset": "ada/beasts"}},
        {"arguments": {"method": "base", "dataset": None, "data_dir": "pets"}},
    ],
    ids=["size", "dataset", "folder"],
)
def test_curves_of_unlike_data_are_not_laid_over_one_another(refused, tmp_path, other):
    first = write(tmp_path / "one", results())
    said = refused(first, write(tmp_path / "two", results(**other)))
    assert "unlike data (one on digits, 360 held out; two on" in said
    refused(DIGITS, write(tmp_path / "two", results(**other)))


def test_records_of_something_else_are_refused(refused, tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text('{"kind": "note"}\n')
    assert "holds no runs, but 1 records of something else" in refused(file)


def test_a_picture_of_no_known_kind_is_refused_before_anything_is_read(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        hf_rwp(["curves", str(tmp_path / "gone"), "--output", str(tmp_path / "curves.bmpx")])
    assert stopped.value.code == 2
    assert "must end in one of .png, .svg, .pdf" in capsys.readouterr().err


def test_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        hf_rwp(["curves", "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
