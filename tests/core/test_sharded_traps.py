"""What once gave a wrong number, or none, where FSDP2 or tensor parallelism holds the weights: each by its name."""

import dataclasses

import pytest
import torch
from distributed import run, run_each
from sharded import Case, assert_mixed, assert_same, build, follow, part, parts_of, record, shard, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from hf_rwp import RWP
from hf_rwp.core.draws import Draws, Target
from hf_rwp.core.sharding import block_of, gatherers, local_of


def evaluate(model, optimizer=None):
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 5, 6, dtype=torch.float64))
    model.train()


def ask_ahead(model):
    model.unshard(async_op=True)


def gather_ahead(model):
    model.unshard()


class NoEvent:
    """Of an accelerator; on a CPU there are no streams that could wait for it."""

    def record(self):
        raise AssertionError


def set_event(model):
    """As a loop does after every optimizer step, which is before our noise."""
    model.set_post_optim_event(NoEvent())


@pytest.mark.parametrize("engine", ["hsdp", "fsdp"])
def test_first_forward_when_the_hook_of_fsdp2_is_in_front(engine):
    case = Case(engine, accumulation=2, wrapped_first=True)
    assert_mixed(case, run(4, record, case, keep_group=True))


MIXED = {
    "an evaluation leaves the root gathered": [
        Case("hsdp", ahead=evaluate),
        Case("fsdp", ahead=evaluate, accumulation=2),
    ],
    "gathered by the loop": [Case("hsdp", ahead=gather_ahead), Case("fsdp", ahead=gather_ahead, accumulation=2)],
    "asked for ahead": [Case("hsdp", ahead=ask_ahead), Case("fsdp", ahead=ask_ahead, accumulation=2)],
    "an event after the step": [Case("hsdp", ahead=set_event)],
    "an evaluation between the passes": [
        Case("hsdp", between=evaluate),
        Case("fsdp", between=evaluate, accumulation=2),
    ],
}


@pytest.mark.parametrize("trap", MIXED)
def test_step_gradient_is_the_mix_when(trap):
    cases = [dataclasses.replace(case, windows=2) for case in MIXED[trap]]
    for case, ranks in zip(cases, run_each(4, record, [(case,) for case in cases], keep_group=True), strict=True):
        assert_mixed(case, ranks)
