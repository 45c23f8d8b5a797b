import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hf_rwp.runs.checkpoints import (
    checkpoints_in,
    load_checkpoint,
    newest,
    read_state,
    remove_checkpoints,
    save_checkpoint,
)


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return accelerator


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_steps_are_in_order_and_leftovers_are_none_of_them(tmp_path):
    for name in ("step_10", "step_9", "step_11.partial", "step_8.removed", "step_best", "logs"):
        (tmp_path / name).mkdir()
    assert list(checkpoints_in(tmp_path)) == [9, 10]
    assert newest(tmp_path) == tmp_path / "step_10"
    assert newest(tmp_path / "absent") is None


def test_a_checkpoint_is_whole_and_takes_the_place_of_leftovers(accelerator, tmp_path):
    (tmp_path / "step_3.partial").mkdir()
    (tmp_path / "step_3.partial" / "junk").write_text("half")
    save_checkpoint(accelerator, tmp_path / "step_3", {"images": 7})
    assert names(tmp_path) == ["step_3"]
    assert read_state(tmp_path / "step_3") == {"images": 7}
    assert "junk" not in names(tmp_path / "step_3")
    accelerator.load_state(tmp_path / "step_3")


def test_a_step_that_is_there_is_never_without_a_checkpoint(accelerator, tmp_path):
    save_checkpoint(accelerator, tmp_path / "step_3", {"images": 7})
    save_checkpoint(accelerator, tmp_path / "step_3", {"images": 8})
    assert read_state(tmp_path / "step_3") == {"images": 7}
    assert names(tmp_path) == ["step_3"]


def test_only_what_is_to_be_kept_is_kept(tmp_path):
    for name in ("step_1", "step_2", "step_3", "step_2.removed", "step_4.partial", "others", "step_1.backup"):
        (tmp_path / name).mkdir()
    remove_checkpoints(tmp_path, keep=[3])
    assert names(tmp_path) == ["others", "step_1.backup", "step_3"]


@pytest.mark.parametrize("content", [None, "", "{", "[1", "[1]", '{"images": 7}'])
def test_what_is_not_whole_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        read_state(tmp_path)


def test_a_checkpoint_of_something_else_is_refused(accelerator, tmp_path):
    save_checkpoint(accelerator, tmp_path / "step_1", {"images": 1})
    with pytest.raises(ValueError, match=r"another recipe or version: it lacks losses"):
        read_state(tmp_path / "step_1", needed=["images", "losses"])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_failure_leaves_the_earlier_ones_alone(accelerator, tmp_path, monkeypatch, error):
    save_checkpoint(accelerator, tmp_path / "step_1", {})

    def full(self, folder):
        Path(folder).mkdir(parents=True)
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(OSError, match=r"step_2 could not be written .*step_1 is intact"):
        save_checkpoint(accelerator, tmp_path / "step_2", {})
    assert names(tmp_path) == ["step_1"]


def test_a_failure_to_publish_is_one_too(accelerator, tmp_path, monkeypatch):
    def fails(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match=r"step_2 could not be written .PermissionError"):
        save_checkpoint(accelerator, tmp_path / "step_2", {})
    assert names(tmp_path) == []


@pytest.mark.parametrize("event", range(1, 9))
def test_a_kill_anywhere_in_writing_leaves_a_whole_checkpoint(accelerator, tmp_path, event):
    """In a fork, ahead of each thing that touches the disk."""
    save_checkpoint(accelerator, tmp_path / "step_1", {"images": 1})
    process = os.fork()
    if process == 0:
        left = iter(range(event - 1))

        def dying(function):
            def call(*arguments, **options):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        Accelerator.save_state = dying(Accelerator.save_state)
        os.fsync, Path.write_text, Path.rename = dying(os.fsync), dying(Path.write_text), dying(Path.rename)
        save_checkpoint(accelerator, tmp_path / "step_2", {"images": 2})
        remove_checkpoints(tmp_path, keep=[2])
        os._exit(0)
    os.waitpid(process, 0)
    last = newest(tmp_path)
    assert read_state(last)["images"] in (1, 2)
    accelerator.load_state(last)


# What is read is what was written, and nothing in it is run


@pytest.fixture
def written(accelerator, tmp_path):
    folder = tmp_path / "step_3"
    save_checkpoint(accelerator, folder, {"images": 7}, {"ema": torch.nn.Linear(2, 1)})
    assert {"model.safetensors", "ema.safetensors", "optimizer.bin", "random_states_0.pkl"} <= set(names(folder))
    return folder


FILES = ["model.safetensors", "ema.safetensors", "optimizer.bin", "random_states_0.pkl"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["cut", "changed", "removed"])
def test_a_file_that_is_not_what_was_written_is_named(written, file, how):
    content = (written / file).read_bytes()
    if how == "removed":
        (written / file).unlink()
    else:
        flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        (written / file).write_bytes(content[: len(content) // 2] if how == "cut" else flipped)
    said = "is missing" if how == "removed" else "has changed"
    with pytest.raises(ValueError, match=f"step_3 is not the checkpoint that was written: {file} {said}"):
        read_state(written)


def test_a_file_that_was_put_there_is_named(written):
    (written / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin does not belong there"):
        read_state(written)


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


@pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_pickle_is_refused_by_name_and_not_run(accelerator, written, tmp_path, file, protocol):
    """Even where whoever put it there went round `read_state`."""
    if protocol == "torch":
        torch.save(Bomb(tmp_path / "boom"), written / file)
    else:
        (written / file).write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(ValueError, match=f"{file} holds more than tensors"):
        load_checkpoint(accelerator, written)
    assert not (tmp_path / "boom").exists()


def test_modules_beside_the_model_come_back_to_the_bit(accelerator, written, tmp_path):
    average = torch.nn.Linear(2, 1)
    save_checkpoint(accelerator, tmp_path / "step_4", {}, {"ema": average})
    again = torch.nn.Linear(2, 1)
    load_checkpoint(accelerator, tmp_path / "step_4", {"ema": again})
    assert torch.equal(again.weight, average.weight)
    assert torch.equal(again.bias, average.bias)
