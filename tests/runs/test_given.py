"""runs/given.py: the flags that a run keeps, and what of them comes back."""

import json
from pathlib import Path

import pytest

from hf_rwp.runs.given import FLAGS, Given, join_flags, save_flags, split_flags, with_those_of_the_run

NAMES = ("lr", "rwp", "scale", "data_dir", "epochs", "output_dir", "resume_from_checkpoint", "eval_only", "aa", "model")


def nowhere():
    raise AssertionError("the default folder is asked for where none is needed")


def test_a_command_line_is_split_by_flag_and_joined_again():
    words = [
        "--lr=0.1",
        "--scale",
        "0.5",
        "1",
        "--no_rwp",
        "--lr",
        "0.2",
        "--aa=--x",
        "--data-dir",
        "a b",
        "--eval_only",
    ]
    flags = split_flags(words, NAMES)
    assert flags == {
        "scale": ["0.5", "1"],
        "rwp": ["false"],
        "lr": ["0.2"],
        "aa": ["--x"],
        "data_dir": ["a b"],
        "eval_only": [],
    }
    assert split_flags(join_flags(flags), NAMES) == flags


def test_tokens_are_kept_nowhere(tmp_path):
    words = ["--hub_token", "hf_secret", "--push_to_hub_token=hf_secret", "--lr", "0.1"]
    save_flags(tmp_path, split_flags(words, NAMES))
    assert json.loads((tmp_path / FLAGS).read_text()) == {"lr": ["0.1"]}


def test_paths_are_kept_as_absolute_ones_and_flags_of_a_session_are_not(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "resnet50").mkdir()
    monkeypatch.chdir(tmp_path)
    flags = {"data_dir": ["photos"], "model": ["resnet50"], "output_dir": ["out"], "eval_only": []}
    texts = {name: tmp_path / name for name in ("data_file", "known_file")}
    flags |= {name: [name] for name in texts}
    for file in texts.values():
        file.touch()
    save_flags(tmp_path, flags | {"resume_from_checkpoint": ["latest"], "overwrite_output_dir": []})
    kept = {"data_dir": [str(tmp_path / "photos")], "model": ["resnet50"]}
    assert json.loads((tmp_path / FLAGS).read_text()) == kept | {name: [str(file)] for name, file in texts.items()}


@pytest.mark.parametrize("named", ["", "checkpoints/step_3", "checkpoint-3"])
def test_a_run_is_found_from_its_folder_and_from_its_checkpoints(tmp_path, named):
    run = tmp_path / "run"
    (run / named).mkdir(parents=True)
    save_flags(run, {"lr": ["0.1"], "epochs": ["5"]})
    given = with_those_of_the_run({"resume_from_checkpoint": [str(run / named)], "epochs": ["6"]}, nowhere, NAMES)
    assert given.run == run
    assert given.of_the_run == {"lr": ["0.1"], "epochs": ["5"], "output_dir": [str(run)]}
    assert given.anew == {"epochs": ["6"]}
    assert (given.flags["lr"], given.flags["epochs"]) == (["0.1"], ["6"])
    assert given.lines()[1] == "given now: epochs=6, which is 5 there"


def test_latest_is_of_the_output_folder_or_of_its_default(tmp_path):
    save_flags(tmp_path, {"lr": ["0.1"]})
    latest = {"resume_from_checkpoint": ["latest"]}
    assert with_those_of_the_run(latest | {"output_dir": [str(tmp_path)]}, nowhere, NAMES).run == tmp_path
    assert with_those_of_the_run(latest, lambda: str(tmp_path), NAMES).run == tmp_path


def test_the_same_flag_given_again_is_not_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    save_flags(tmp_path, {"data_dir": ["photos"]})
    given = with_those_of_the_run({"resume_from_checkpoint": ["."], "data_dir": ["photos"]}, nowhere, NAMES)
    assert given.anew == {}


def test_a_run_without_kept_flags_gives_none(tmp_path):
    flags = {"resume_from_checkpoint": [str(tmp_path)], "lr": ["0.1"]}
    assert with_those_of_the_run(flags, nowhere, NAMES) == Given(flags)
    assert with_those_of_the_run({}, nowhere, NAMES).lines() == []


def test_the_flags_of_another_recipe_and_a_damaged_file_are_told(tmp_path):
    save_flags(tmp_path, {"learning_rate": ["0.1"]})
    flags = {"resume_from_checkpoint": [str(tmp_path)]}
    with pytest.raises(ValueError, match="another recipe or version, which was given --learning_rate"):
        with_those_of_the_run(flags, nowhere, NAMES)
    for damaged in ("[1]", '{"lr":', '{"lr": 1}'):
        (tmp_path / FLAGS).write_text(damaged)
        with pytest.raises(ValueError, match=f"{FLAGS} does not hold the flags of a run"):
            with_those_of_the_run(flags, nowhere, NAMES)
