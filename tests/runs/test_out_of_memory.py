"""runs/out_of_memory.py: what is to be tried is smaller, is accepted, and leaves a step's images as they are."""

import re
from types import SimpleNamespace

import forked
import pytest

from hf_rwp.core.arguments import RWPArguments
from hf_rwp.core.placement import fewest_micro_steps, mixes
from hf_rwp.images.arguments import TimmArguments
from hf_rwp.runs.out_of_memory import advice

ON_GPU = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB")
ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried")
SCRIPT = """
import dataclasses
import torch
from hf_rwp.runs.parsing import start

@dataclasses.dataclass
class Flags:
    batch_size: int = dataclasses.field(default=64, metadata={"help": "Images."})
    kind: str = dataclasses.field(default="cpu", metadata={"help": "What fails."})

def evaluate(flags):
    if flags.kind == "gpu":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if flags.kind == "python":
        bytearray(2**60)
    torch.empty(2**55)

start(evaluate, Flags)
"""


@pytest.mark.parametrize(("kind", "where"), [("cpu", ""), ("python", ""), ("gpu", " on the GPU")])
def test_a_script_that_runs_out_of_memory_ends_with_what_to_try(tmp_path, kind, where):
    (tmp_path / "recipe.py").write_text(SCRIPT)
    run = forked.run(tmp_path / "recipe.py", "--kind", kind)
    smaller = "a smaller model, or smaller images or texts"
    line = f"error: out of memory{where}: try --batch_size 32 (it was 64), or {smaller}\n"
    assert (run.returncode, run.stderr) == (2, line)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 12, 50, 64, 90, 128])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(("rwp", "antithetic"), [(False, False), (True, False), (True, True)])
def test_timms_batch_is_cut_into_more_parts_of_the_same_step(size, steps, rwp, antithetic):
    arguments = RWPArguments(rwp=rwp, rwp_antithetic=antithetic)
    flags = TimmArguments(batch_size=size, gradient_accumulation_steps=steps)
    vars(arguments).update(vars(flags))
    said = advice(ON_GPU, arguments)
    parts = max(steps, fewest_micro_steps(1, 0.5, antithetic) if rwp else 1)
    if found := re.search(r"--gradient_accumulation_steps (\d+), the same (\d+) to a step in parts of (\d+)", said):
        more, kept, part = map(int, found.groups())
        assert (kept, part * more) == (size, size)
        assert 2 <= part < size / parts
        TimmArguments(batch_size=size, gradient_accumulation_steps=more).check_batch(1, more, rwp and mixes(0.5))
    if found := re.search(r"--batch_size (\d+)", said):
        smaller = int(found[1])
        assert smaller < size
        TimmArguments(batch_size=smaller, gradient_accumulation_steps=steps).check_batch(1, parts, rwp and mixes(0.5))
    assert found or "a smaller model" in said


@pytest.mark.parametrize(
    ("size", "steps", "rwp", "world", "said"),
    [
        (64, 1, True, 1, "--per_device_train_batch_size 16 --gradient_accumulation_steps 4, the same 64 to a step"),
        (64, 1, True, 2, "--per_device_train_batch_size 32 --gradient_accumulation_steps 2, the same 64 to a step"),
        (
            64,
            1,
            False,
            1,
            "--per_device_train_batch_size 32 --gradient_accumulation_steps 2, the same 64 to a step",
        ),
        (10, 3, True, 1, "--per_device_train_batch_size 5 --gradient_accumulation_steps 6, the same 30 to a step"),
        (1, 8, True, 1, "a smaller model, or smaller images or texts"),
    ],
)
def test_trainers_batch_becomes_smaller_and_more_of_them_a_step(monkeypatch, size, steps, rwp, world, said):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    arguments = RWPArguments(rwp=rwp)
    vars(arguments).update(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    assert advice(ON_GPU, arguments) == f"out of memory on the GPU: try {said}"


def test_in_evaluation_its_own_batch_is_the_one():
    arguments = SimpleNamespace(per_device_train_batch_size=8, per_device_eval_batch_size=100)

    def evaluation_loop():
        raise RuntimeError(*ON_CPU.args)  # a raised error keeps where it was raised

    with pytest.raises(RuntimeError) as failed:
        evaluation_loop()
    said = advice(failed.value, arguments)
    assert said.startswith("out of memory: try --per_device_eval_batch_size 48 (it was 100), or a smaller model")


def test_a_model_that_does_not_fit_is_no_matter_of_the_batch():
    def create_model():
        raise RuntimeError(*ON_CPU.args)  # a raised error keeps where it was raised

    with pytest.raises(RuntimeError) as failed:
        create_model()
    arguments = SimpleNamespace(batch_size=64, gradient_accumulation_steps=1)
    assert advice(failed.value, arguments) == "out of memory: try a smaller model, or smaller images or texts"


def test_that_of_a_process_of_torchs_spawn_is_one():
    from torch.multiprocessing import ProcessRaisedException

    text = "-- Process 0 terminated with the following error:\ntorch.OutOfMemoryError: CUDA out of memory."
    said = advice(ProcessRaisedException(text, 0, 1), SimpleNamespace(batch_size=16))
    assert said.startswith("out of memory on the GPU: try --batch_size 8 (it was 16)")


def test_other_errors_are_not_of_memory():
    assert advice(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None) is None
    assert advice(ValueError("out of memory"), None) is None
    assert (
        advice(MemoryError(), None)
        == "out of memory: try a smaller batch, or a smaller model, or smaller images or texts"
    )
