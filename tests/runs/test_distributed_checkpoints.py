"""Checkpoints of sharded weights, read by one process and without running their code; batches in step."""

import pickle
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from distributed import rank, run, stop
from launched import under
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from hf_rwp.runs.checkpoints import load_checkpoint
from hf_rwp.runs.distributed_checkpoints import checkpoint_weights, read_metadata, refuse_code
from hf_rwp.runs.sharded import in_lockstep, refuse_sharded, replicas_of_run

SHARDS = "pytorch_model_fsdp_0"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def weights() -> dict[str, torch.Tensor]:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return dict(module.bfloat16().state_dict())


def written(folder: Path, state: dict) -> Path:
    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


def test_weights_are_read_whole_however_they_were_saved(tmp_path):
    expected = weights()
    save_file(expected, tmp_path / "model.safetensors")
    (tmp_path / "full").mkdir()
    torch.save(expected, tmp_path / "full" / "pytorch_model_fsdp.bin")
    written(tmp_path / "sharded" / SHARDS, {"model": expected})
    for folder in (tmp_path, tmp_path / "full", tmp_path / "sharded"):
        found = checkpoint_weights(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert {name: value.dtype for name, value in found.items()} == {k: v.dtype for k, v in expected.items()}
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        checkpoint_weights(tmp_path / "sharded" / SHARDS)


def test_plain_data_beside_tensors_is_no_code(tmp_path):
    plain = {"lr": 0.1, "betas": (0.9, 0.999), "name": "sgd", "step": torch.tensor(3.0), "none": None}
    refuse_code(written(tmp_path / "optimizer_0", {"optimizer": plain}))


def test_paths_that_python_3_13_wrote_are_read(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"cpathlib._local\nPosixPath\n(Vshard\ntR.")
    assert read_metadata(tmp_path) == Path("shard")


def test_code_beside_tensors_is_refused_and_not_run(tmp_path):
    folder = written(tmp_path / "optimizer_0", {"optimizer": {"lr": Touch(tmp_path / "ran")}})
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(pickle.UnpicklingError):
        refuse_code(folder)
    assert not (tmp_path / "ran").exists()


GADGETS = {  # as `pickle` calls a function by its module and name
    "function": b"cposix\nsystem\n(S'touch ran'\ntR.",
    "by way of a module that belongs there": (
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c\x09touch ran\x85R."
    ),
    "of torch": b"ctorch\nload\n(S'ran'\ntR.",
}


@pytest.mark.parametrize("gadget", GADGETS)
def test_code_in_the_description_of_shards_is_refused_and_not_run(gadget, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path / "step_1" / SHARDS, {"model": weights()})
    (folder / ".metadata").write_bytes(GADGETS[gadget])
    with pytest.raises(pickle.UnpicklingError, match="does not belong there"):
        refuse_code(folder)
    with pytest.raises(pickle.UnpicklingError, match="does not belong there"):
        checkpoint_weights(tmp_path / "step_1")
    assert not (tmp_path / "ran").exists()


def test_sharded_weights_are_not_resumed_where_they_are_whole(tmp_path):
    written(tmp_path / "step_1" / SHARDS, {"model": weights()})
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="weights were sharded by FSDP2, and are whole here"):
        load_checkpoint(Accelerator(cpu=True), tmp_path / "step_1")


def numbers(counts: list[int]) -> list[tuple[list[int], int]]:
    """For each number of batches on rank 0, where others have three, what came, and of how many replicas."""
    with under("fsdp2_8"):
        accelerator = Accelerator()
        refuse_sharded(accelerator)
        batches = [range(count if rank() == 0 else 3) for count in counts]
        return [(list(in_lockstep(accelerator, some, -1)), replicas_of_run(accelerator)) for some in batches]


def test_processes_that_hold_weights_together_take_as_many_batches_each():
    stop()
    first, second = run(2, numbers, [0, 2, 3, 4])
    assert first == [([-1, -1, -1], 1), ([0, 1, -1], 1), ([0, 1, 2], 1), ([0, 1, 2, 3], 1)]
    assert second == [([0, 1, 2], 1)] * 3 + [([0, 1, 2, -1], 1)]


def test_processes_with_all_weights_wait_for_nobody():
    AcceleratorState._reset_state(True)
    assert list(in_lockstep(Accelerator(cpu=True), [1, 2], -1)) == [1, 2]
