"""The guarantees where a mesh of processes holds the weights: FSDP2, HSDP, tensor parallelism, on real gloo ranks."""

import pytest
import sharded
from distributed import run, run_each, stop
from sharded import PARALLEL, Case, assert_mixed, record, shard


@pytest.fixture(autouse=True)
def new_processes():
    """DTensor caches plans with the names of process groups, which a test before this one may have ended."""
    stop()


ENGINES = ["hsdp", "replicate", "fsdp", "tp", "fsdp_tp", "hsdp_tp"]


def cases_of(engine: str, **options) -> list[Case]:
    counts = (1, 2, 3) if engine in PARALLEL else (2, 3)
    cases = [Case(engine, alpha, accumulation=count, **options) for count in counts for alpha in (0.3, 1.0)]
    return cases if engine in PARALLEL else [*cases, Case(engine, 1.0, **options)]


@pytest.mark.parametrize("engine", ENGINES)
def test_step_gradient_is_the_mix(engine):
    cases = cases_of(engine)
    for case, ranks in zip(cases, run_each(cases[0].world, record, [(case,) for case in cases]), strict=True):
        assert_mixed(case, ranks)


@pytest.mark.parametrize("engine", ["hsdp", "fsdp"])
def test_first_forward_when_the_hook_of_fsdp2_is_in_front(engine):
    case = Case(engine, accumulation=2, wrapped_first=True)
    assert_mixed(case, run(4, record, case))


def assigned(case: Case) -> list:
    """`record`, with weights that `load_state_dict(assign=True)` put in the place of the sharded ones."""

    def shard_and_assign(*args) -> None:
        shard(*args)
        args[1].load_state_dict({name: value.clone() for name, value in args[1].state_dict().items()}, assign=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "shard", shard_and_assign)
        return record(case)


@pytest.mark.parametrize("engine", ["hsdp", "fsdp"])
def test_shards_that_fsdp2_moves_at_the_first_forward_get_their_noise(engine):
    case = Case(engine, alpha=1.0)
    assert_mixed(case, run(4, assigned, case))
