"""runs/run.py by itself; tests/recipes/test_imagenet_runs.py has whole runs."""

import distributed
import pytest
from accelerate import Accelerator

from hf_rwp.runs.resuming import checkpoint_to_resume, refuse_other_flags
from hf_rwp.runs.run import agree, on_main


def find(folder, wanted=None, *, last=None, finished=False, overwrite=False):
    return checkpoint_to_resume(wanted, folder, folder / "checkpoints", last, finished=finished, overwrite=overwrite)


def test_the_checkpoint_is_the_one_that_the_flag_names(tmp_path):
    last = tmp_path / "checkpoints" / "step_3"
    assert find(tmp_path) is None
    assert find(tmp_path, "latest", last=last) == last
    assert find(tmp_path, str(last.with_name("step_1")), last=last) == last.with_name("step_1")
    assert find(tmp_path, "elsewhere/step_1") == type(tmp_path)("elsewhere/step_1")
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint: start without"):
        find(tmp_path / "alone", "latest")


@pytest.mark.parametrize("wanted", [None, "elsewhere/step_1"])
def test_a_run_is_lost_only_when_told_so(tmp_path, wanted):
    last = tmp_path / "checkpoints" / "step_3"
    with pytest.raises(FileExistsError, match="holds the checkpoints of an unfinished run"):
        find(tmp_path, wanted, last=last)
    with pytest.raises(FileExistsError, match="holds a finished run"):
        find(tmp_path, wanted, finished=True)
    find(tmp_path, wanted, last=last, finished=True, overwrite=True)


def test_flags_that_come_back_with_a_checkpoint_are_refused():
    saved = {"lr": 0.1, "seed": 0, "opt": "sgd"}
    refuse_other_flags({"lr": 0.2, "seed": 0, "new": 1}, saved, {"seed", "opt", "new"}, "--weights")
    with pytest.raises(ValueError, match=r"written with lr=0.1, and keeps that.*\(--weights\)"):
        refuse_other_flags({"lr": 0.2, "seed": 0}, saved, {"lr"}, "--weights")


def agreed_on_rank(stops, unreadable, limit):
    rank = distributed.rank()
    try:
        return agree(Accelerator(cpu=True), unreadable[rank], limit, stops[rank])
    except ValueError as error:
        return str(error)


def test_replicas_agree_on_stopping_and_on_what_none_of_them_could_read():
    assert distributed.run(2, agreed_on_rank, [False, True], [[], []], 0) == [(True, 0)] * 2
    assert distributed.run(2, agreed_on_rank, [False, False], [[3, 5], [5]], 2) == [(False, 2)] * 2
    said = distributed.run(2, agreed_on_rank, [False, False], [[3], [5, 7]], 2)
    assert all(text.startswith("3 images could not be read, more than max_bad_images=2") for text in said)


def refused_on_rank():
    def refuse():
        raise KeyError(f"rank {distributed.rank()}")

    try:
        on_main(Accelerator(cpu=True), refuse, KeyError)
    except KeyError as error:
        return str(error)
    return ""


def test_an_error_on_the_main_process_is_one_on_all():
    first, second = distributed.run(2, refused_on_rank)
    assert "rank 0" in first
    assert first == second
