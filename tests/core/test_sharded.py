"""The guarantees where a mesh of processes holds the weights: FSDP2, HSDP, tensor parallelism, on real gloo ranks."""

import pytest
import torch
from distributed import run_each
from sharded import PARALLEL, Case, assert_mixed, assert_replicas_agree, follow, record
from torch.distributed.fsdp import MixedPrecisionPolicy

ENGINES = ["hsdp", "replicate", "fsdp", "tp", "fsdp_tp", "hsdp_tp"]


def cases_of(engine: str, **options) -> list[Case]:
    counts = (1, 2, 3) if engine in PARALLEL else (2, 3)
    cases = [Case(engine, 0.3, accumulation=count, windows=2, **options) for count in counts]
    return [*cases, Case(engine, 1.0, accumulation=2, **options), Case(engine, 1.0, windows=2, **options)]


@pytest.mark.parametrize("engine", ENGINES)
def test_step_gradient_is_the_mix(engine):
    cases = cases_of(engine)
    answers = run_each(4, record, [(case,) for case in cases], keep_group=True)
    for case, ranks in zip(cases, answers, strict=True):
        assert_mixed(case, ranks)


# Gradients that are reduced once for all micro-steps, some only over the shards.
SYNCS = [Case(engine, accumulation=3, sync_each=False, windows=2) for engine in ("hsdp", "fsdp", "hsdp_tp")]


def test_step_gradient_is_the_mix_where_it_is_reduced_once():
    for case, ranks in zip(SYNCS, run_each(4, record, [(case,) for case in SYNCS], keep_group=True), strict=True):
        assert_mixed(case, ranks)


LONG = {
    "momentum": Case("hsdp", windows=30),
    "clipping": Case("hsdp", windows=30, clip=0.05),
    "K=3": Case("hsdp", windows=10, accumulation=3, clip=0.05),
    "bf16": Case("hsdp", windows=30, dtype=torch.float32, sharding={"mp_policy": MixedPrecisionPolicy(torch.bfloat16)}),
}


def test_replicas_are_bit_equal_after_30_steps():
    answers = run_each(4, follow, [(case,) for case in LONG.values()], keep_group=True)
    for case, ranks in zip(LONG.values(), answers, strict=True):
        assert all(weights for _, weights in ranks)
        assert_replicas_agree(case, ranks)
        _, weights = ranks[0]
        moved = [
            not torch.equal(weights[0][name], weights[-1][name]) for name in weights[0] if weights[0][name].numel()
        ]
        assert all(moved)
