"""A new folder for every run, whoever starts at the same time."""

import multiprocessing
import subprocess
import sys

import distributed
import pytest
from accelerate import Accelerator

from hf_rwp.runs import folders
from hf_rwp.runs.arguments import RunArguments
from hf_rwp.runs.folders import latest_folder, new_folder
from hf_rwp.runs.resuming import settle_folder


def test_runs_get_folders_in_a_row(tmp_path):
    first = tmp_path / "outputs" / "digits"
    made = [new_folder(first) for _ in range(3)]
    assert made == [first, first / "2", first / "3"]
    assert all(folder.is_dir() for folder in made)


def claim(first, made):
    folder = new_folder(first)
    (folder / "keeps").touch()  # or it goes with the process, as of Python 3.13
    made.put(str(folder))


def test_processes_that_start_at_once_get_different_ones(tmp_path):
    context = multiprocessing.get_context("fork")
    made = context.Queue()
    started = [context.Process(target=claim, args=(tmp_path / "run", made)) for _ in range(8)]
    for process in started:
        process.start()
    names = {made.get(timeout=60) for _ in started}
    for process in started:
        process.join()
    assert len(names) == 8


def test_a_folder_that_nothing_was_written_to_goes_again(tmp_path):
    empty, full = new_folder(tmp_path / "empty"), new_folder(tmp_path / "full")
    (full / "results.json").touch()
    for folder in (empty, full):
        folders._remove_empty(folder)
    assert not empty.exists()
    assert full.exists()


def test_the_folders_above_that_were_made_for_it_go_with_it(tmp_path):
    """As after a refusal, where a process ends ahead of any work."""
    program = "from pathlib import Path; from hf_rwp.runs.folders import new_folder; new_folder(Path('outputs/a/net'))"

    def left(more):
        subprocess.run([sys.executable, "-c", program + more], cwd=tmp_path, check=True)
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))

    assert left("") == []
    assert left("; Path('outputs/kept').touch()") == ["outputs", "outputs/kept"]


def test_latest_is_the_last_in_the_row_that_can_go_on(tmp_path):
    first = tmp_path / "run"
    assert latest_folder(first) == first
    for checkpoint in ("checkpoints/step_3", "2/checkpoints/step_6", "3/checkpoints/step_2.partial", "4"):
        (first / checkpoint).mkdir(parents=True)
    assert latest_folder(first) == first / "2"
    (first / "4" / "checkpoint-8").mkdir()
    assert latest_folder(first) == first / "2"
    (first / "4" / "checkpoint-8" / "trainer_state.json").touch()  # which Trainer writes last
    assert latest_folder(first) == first / "4"


def settled(first, **flags):
    args = RunArguments(output_dir=str(first), **flags)
    args.numbered = True
    settle_folder(args)
    return args.output_dir


def test_only_a_new_run_gets_a_new_folder(tmp_path):
    first = tmp_path / "run"
    (first / "2" / "checkpoints" / "step_2").mkdir(parents=True)
    assert settled(first) == str(first / "3")
    assert settled(first, resume_from_checkpoint="latest") == str(first / "2")
    assert settled(first, resume_from_checkpoint=str(first / "checkpoints" / "step_1")) == str(first)
    assert settled(first, overwrite_output_dir=True) == str(first)
    assert settled(first, eval_only=True) == str(first)
    args = RunArguments(output_dir=str(first))
    settle_folder(args)
    assert args.output_dir == str(first)  # as a flag named it


def test_a_run_that_was_cut_is_named_ahead_of_a_new_one(tmp_path, capsys):
    first = tmp_path / "my run"
    (first / "checkpoints" / "step_2").mkdir(parents=True)
    settled(first)
    assert f"{first} has a run that was cut: --resume_from_checkpoint '{first}' goes on" in capsys.readouterr().out
    (first / "results.json").touch()
    settled(first)
    assert capsys.readouterr().out == ""


def settled_on_rank(first):
    Accelerator(cpu=True)
    return settled(first)


def test_all_processes_of_a_run_share_one(tmp_path):
    (tmp_path / "run").mkdir()
    assert distributed.run(2, settled_on_rank, tmp_path / "run") == [str(tmp_path / "run" / "2")] * 2


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written to"):
        settled(tmp_path / "file" / "run")
