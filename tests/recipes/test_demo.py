"""`hf-rwp demo` as a person meets it: on a terminal, in a pipe, a second time, interrupted, without SAM's package."""

import json
import re

import forked
import pytest
from imagenet import RECIPES, load_recipe
from terminal import drawn_by

from hf_rwp.experiments.demonstration import best_of_search
from hf_rwp.runs.parsing import start
from hf_rwp.runs.records import read_records

TINY = ["--epochs=2", "--train_images=64"]
METHODS = ("plain", "SAM", "RWP")
ON_A_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return load_recipe(RECIPES / "demo.py")


@pytest.fixture
def undrawn(demo, monkeypatch):
    """The picture takes longer than the training."""
    monkeypatch.setattr(demo, "demonstration", lambda runs, picture, title: picture.touch())


def run(demo, folder, *flags):
    start(demo.main, demo.Arguments, argv=[*TINY, f"--output_dir={folder}", *map(str, flags)])


def command(folder):
    return ["-m", "hf_rwp.cli", "demo", *TINY, "--output_dir", folder]


def test_in_a_pipe_it_says_what_it_does_and_what_it_saw(tmp_path):
    folder = tmp_path / "demo"
    shown = forked.run(*command(folder), **ON_A_CPU)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert "\r" not in shown.stdout
    assert lines[0] == "A small ResNet learns handwritten digits; 40 % of its labels are random."
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [epoch.partition(":")[0] for epoch in epochs] == ["epoch  1/2", "epoch  2/2"]
    for name in METHODS:
        assert re.search(rf"{name} [\d.]+ %", epochs[-1])
        assert any(line.startswith(f"{name:<5}  ") and len(line.split()) == 6 for line in lines)
    text = " ".join(lines)
    assert "RWP made " in text
    assert "task where flat minima are said to help" in text
    assert lines[-4] == ""
    assert lines[-3].startswith("optimizer = RWP(optimizer, model, gamma=0.01) ")
    assert lines[-2].startswith("hf-rwp train --data_dir path/to/images ")
    assert lines[-1].startswith("hf-rwp gamma ")
    assert f"Wrote {folder / 'demo.png'}" in shown.stdout
    assert [path.name for path in folder.iterdir()] == ["demo.png"]
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in shown.stderr
    assert "times as large as its weights" not in shown.stderr


def test_on_a_terminal_each_method_has_a_line_in_place(tmp_path):
    status, text = drawn_by(*command(tmp_path / "demo"), **ON_A_CPU)
    assert status == 0, text
    assert "epoch  1/2" not in text  # which is for pipes
    drawn = re.split(r"\r\n|\r|\n|\x1b\[A", text)
    assert max(len(line) for line in drawn if str(tmp_path) not in line) <= 80
    for name in METHODS:
        bars = [line for line in drawn if line.startswith(f"{name:<5} ") and "/2" in line]
        assert " 0/2" in bars[0]
        assert re.search(r" 2/2, +[\d.]+ % right, [\d.]+ gradients, [\d.]+ s, 00:00 left", bars[-1])
    table = text.index("top-1 (%)")
    assert "\x1b[A" not in text[table:]
    assert "/2" not in text[table:]


def test_ctrl_c_ends_it_in_a_line_and_leaves_nothing(tmp_path):
    status, text = drawn_by(*command(tmp_path / "demo"), until=" 1/2", **ON_A_CPU)
    assert status == 130, text
    assert "stopped by Ctrl-C" in text
    assert "Traceback" not in text
    assert not (tmp_path / "demo").exists()


def test_a_second_run_has_a_folder_of_its_own_and_records_are_appended_once(demo, undrawn, tmp_path, capsys):
    results = tmp_path / "records.jsonl"
    run(demo, tmp_path / "demo", "--results", results, "--seeds", 3)
    first = capsys.readouterr().out
    run(demo, tmp_path / "demo", "--results", results, "--seeds", 3, 4)
    second = capsys.readouterr().out
    assert (tmp_path / "demo" / "demo.png").exists()
    assert (tmp_path / "demo" / "2" / "demo.png").exists()
    records = read_records(results)
    assert [(record["seed"], record["method"]) for record in records] == [
        (seed, name) for seed in (3, 4) for name in ("base", "sam", "rwp")
    ]
    for record in records:
        assert len(record["history"]) == 2
        assert record["top1"] == record["history"][-1]["top1"]
        assert record["landscape"]["coordinates"] == demo.COORDINATES
        assert len(record["landscape"]["losses"]) == len(demo.COORDINATES)
        assert record["settings"] == demo.SETTINGS[record["method"]]
        assert record["data_seed"] == record["seed"]
    assert records[0]["command"] == "python recipes/demo.py --seeds 3 --epochs 2 --train_images 64"
    digests = [record["data_sha256"] for record in records]
    assert digests[0] == digests[2] != digests[3] == digests[5]  # of a seed all methods have the same labels
    base, sam, rwp = records[:3]
    assert sam["gradients"] == 2 * base["gradients"] == 2 * rwp["gradients"]
    assert rwp["rwp"]["slots"] == {"clean": 2, "perturbed": 2}
    for text, record in ((first, rwp), (second, records[5])):  # of this run, not of the whole file
        wrong = round(360 * (1 - record["top1"]))
        assert f"RWP made {wrong} errors on 360 held-out images; plain training" in " ".join(text.split())
    run(demo, tmp_path / "demo", "--results", results, "--seeds", 3)
    assert "holds all of these seeds already" in capsys.readouterr().out
    assert not (tmp_path / "demo" / "3" / "demo.png").exists()
    assert len(read_records(results)) == 6


def test_turns_change_nothing(demo, undrawn, tmp_path):
    """A method by itself ends where it ends beside the others."""
    both = tmp_path / "both.jsonl"
    run(demo, tmp_path / "demo", "--results", both)
    accelerator, small = demo.Accelerator(), demo.task(demo.Arguments(epochs=2, train_images=64), 0)
    data = demo.load_data(small, accelerator.device)
    alone = demo.Training(accelerator, small, data, data["train"], "rwp", demo.SETTINGS["rwp"], 0, 2, 64)
    for number in range(2):
        alone.step(number)
    (beside,) = [record for record in read_records(both) if record["method"] == "rwp"]
    assert alone.evaluate(data["test"])["eval_loss"] == beside["history"][-1]["eval_loss"]


def test_without_sams_package_it_shows_two_methods_and_names_the_extra(demo, tmp_path, monkeypatch, capsys):
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: name != "pytorch_optimizer" and find(name))
    run(demo, tmp_path / "demo")
    text = capsys.readouterr().out
    assert "SAM needs pytorch_optimizer, which is not installed: pip install 'hf-rwp[compare]'" in text
    assert "RWP made " in text
    assert "SAM made" not in text


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--epochs=1", "epochs must be at least 2"),
        ("--seeds=-1", "seeds must be in [0, 2^32)"),
        ("--train_images=10", "train_images must be at least 64"),
    ],
)
def test_what_it_cannot_show_is_refused(demo, tmp_path, capsys, flag, said):
    with pytest.raises(SystemExit):
        run(demo, tmp_path / "demo", flag)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_settings_are_the_best_of_the_search(demo):
    files = sorted((RECIPES / "results" / "demo").glob("search_*.jsonl"))
    records = [record for file in files for record in read_records(file)]
    trials = [record for record in records if record["kind"] == "trial" and record["seed"] in (100, 101)]
    for name, settings in demo.SETTINGS.items():
        assert best_of_search(trials, name) == settings


def test_its_record_has_a_section_among_the_results(tmp_path):
    report = load_recipe(RECIPES / "report.py")
    common = {"kind": "run", "task": {"data_dir": None, "model": "test_resnet", "epochs": 30, "label_noise": 0.4}}
    common |= {
        "images": {"evaluated": 360},
        "gradients": 30.0,
        "seconds": 9.0,
        "load_average": 1.5,
        "date": "2026-11-30",
    }
    common |= {"hardware": {"device": "x86_64", "threads": 1}, "command": "python recipes/demo.py --seeds 10 11"}
    common |= {"landscape": {"coordinates": [-0.25, 0.0, 0.25], "losses": [1.5, 1.0, 1.5]}}
    common |= {"history": [{"train_loss": 0.1}]}
    settings = {"lr": 0.1, "weight_decay": 5e-4, "strength": None}
    records = [
        common | {"method": name, "seed": seed, "top1": top1, "settings": settings}
        for name, top1 in (("base", 0.9), ("rwp", 0.95))
        for seed in (10, 11)
    ]
    (tmp_path / "demo").mkdir()
    for name, kept in (("digits", records), ("search_100", [records[0] | {"kind": "trial", "seed": 100}])):
        (tmp_path / "demo" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    other = records[1] | {"kind": "trial", "seed": 102, "top1": 0.1}
    (tmp_path / "demo" / "search_102.jsonl").write_text(json.dumps(other) + "\n")
    text = "\n".join(report.demonstrated(report.read_demonstration(tmp_path)))
    assert "digits, test_resnet, 30 epochs, 40% of labels random, seeds 10 to 11" in text
    assert "`python recipes/demo.py --seeds 10 11`, 2026-11-30, x86_64, 1 thread(s), load average when" in text
    assert "RWP made 18.0 errors on 360 held-out images, on average over 2 seeds; plain training made 36.0" in text
    assert "| RWP over plain | +5.00 ± 0.00 | 2, 0 | 0.5 |" in text
    assert "| plain | 0.1, 0.0005 | **90.00** |" in text  # without the seed that chose nothing
    assert report.read_demonstration(tmp_path / "nothing") == []
