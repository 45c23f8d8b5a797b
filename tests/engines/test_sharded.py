"""The guarantees where a mesh of processes holds the weights: FSDP2, HSDP, tensor parallelism, on real gloo ranks."""

import dataclasses
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from distributed import night, run, run_each
from sharded import (
    PARALLEL,
    TOKENS,
    WIDTH,
    Case,
    assert_mixed,
    assert_replicas_agree,
    assert_same,
    batch,
    build,
    follow,
    follow_built,
    mesh_of,
    part,
    record,
    shard,
    snapshot,
    whole,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.functional import mse_loss

from hf_rwp import RWP
from hf_rwp.core.sharding import gatherers

ENGINES = ["hsdp", "replicate", "fsdp", "tp", "fsdp_tp", "hsdp_tp"]


def cases_of(engine: str, alpha: float) -> list[Case]:
    counts: tuple[int, ...] = (1, 3) if engine in PARALLEL else (2, 3)
    if alpha == 1:
        counts = (2,) if engine in PARALLEL else (1,)
    return [Case(engine, alpha, accumulation=count, windows=2) for count in counts]


ALPHAS = [(engine, alpha) for engine in ENGINES for alpha in (0.3, 1.0)]


@pytest.mark.parametrize(
    ("engine", "alpha"), night(ALPHAS, [(engine, 1.0) for engine in ("replicate", "fsdp_tp", "hsdp_tp")])
)
def test_step_gradient_is_the_mix(engine, alpha):
    cases = cases_of(engine, alpha)
    answers = run_each(4, record, [(case,) for case in cases], keep_group=True)
    for case, ranks in zip(cases, answers, strict=True):
        assert_mixed(case, ranks)


def shard_half(case, model, mesh) -> None:
    shard(case, model, mesh["shard"])


def replicate_all(case, model, mesh) -> None:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    for layer in model.layers:
        replicate(layer, mesh=mesh)
    replicate(model, mesh=mesh)


def distribute_all(case, model, mesh) -> None:
    """DTensors that every rank holds whole, and no FSDP2: gradients are sums that are still to be taken."""
    distribute_module(model, mesh)


def loss_of_dtensors(model, x, y):
    x, y = (DTensor.from_local(tensor, mesh_of(Case("replicated")), [Shard(0)]) for tensor in (x, y))
    return mse_loss(model(x).full_tensor(), y.full_tensor())


def cases_of_replicated(**options) -> list[Case]:
    return [Case("replicated", accumulation=count, windows=2, **options) for count in (1, 2)]


def test_step_gradient_is_the_mix_where_dtensors_are_replicated():
    cases = cases_of_replicated(shard=distribute_all, loss=loss_of_dtensors)
    if find_spec("torch.distributed._composable.replicate_with_fsdp"):  # later than torch 2.8
        cases += cases_of_replicated(shard=replicate_all)
    for case, ranks in zip(cases, run_each(4, record, [(case,) for case in cases], keep_group=True), strict=True):
        assert_mixed(case, ranks)


def test_step_gradient_is_the_mix_in_a_mesh_over_half_of_the_world():
    case = Case("half", accumulation=2, shard=shard_half)
    ranks = run(4, record, case, keep_group=True)
    for half in (ranks[:2], ranks[2:]):
        assert_mixed(dataclasses.replace(case, engine="fsdp2ranks"), half)


def refusal(placements: list[Any]) -> str:
    mesh = mesh_of(Case("two replicate"))
    model = torch.nn.Linear(4, 8, bias=False)
    model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh, placements))
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model)
    try:
        model(distribute_tensor(torch.ones(2, 4), mesh, [Replicate()] * mesh.ndim))
    except NotImplementedError as error:
        return str(error)
    return f"{optimizer.role}"


def test_two_dimensions_that_replicate_all_weights_are_refused_by_name():
    placements = [[Replicate(), Replicate(), Shard(0)], [Replicate()] * 3]
    for answers in run_each(4, refusal, [(own,) for own in placements], keep_group=True):
        assert all("dimensions of the mesh (east, north, shard) replicate all weights" in answer for answer in answers)


# Gradients that are reduced once for all micro-steps, some only over the shards.
SYNCS = [Case(engine, accumulation=3, sync_each=False, windows=2) for engine in ("hsdp", "fsdp", "hsdp_tp")]


def test_step_gradient_is_the_mix_where_it_is_reduced_once():
    for case, ranks in zip(SYNCS, run_each(4, record, [(case,) for case in SYNCS], keep_group=True), strict=True):
        assert_mixed(case, ranks)


def evaluate(model) -> None:
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, TOKENS, WIDTH, dtype=torch.float64))
    model.train()


def loss_in_float32(model, x, y):
    return mse_loss(model(x).float(), y)


LONG = {
    "an evaluation each": Case("hsdp", windows=30, ahead=evaluate),
    "clipping": Case("hsdp", windows=30, clip=0.05),
    "K=3": Case("hsdp", windows=10, accumulation=3, clip=0.05),
    "bf16": Case(
        "hsdp",
        windows=30,
        dtype=torch.float32,
        loss=loss_in_float32,
        sharding={"mp_policy": MixedPrecisionPolicy(torch.bfloat16)},
    ),
}


@pytest.mark.parametrize("name", night(LONG, ["an evaluation each", "K=3"]))
def test_replicas_are_bit_equal_after_30_steps(name):
    case = LONG[name]
    ranks = run(4, follow, case, keep_group=True)
    assert all(weights for _, weights in ranks)
    assert_replicas_agree(case, ranks)
    _, weights = ranks[0]
    moved = [not torch.equal(weights[0][name], weights[-1][name]) for name in weights[0] if weights[0][name].numel()]
    assert all(moved)


def clean_parts(base) -> list[torch.Tensor]:
    """What this process has of the weights, gathered or not."""
    return [part(parameter) for group in base.param_groups for parameter in group["params"]]


def rearm(model, optimizer) -> None:
    optimizer.eval()
    optimizer.train()


LOOKS = {
    "state_dict": lambda model, optimizer: model.state_dict(),
    "state_dict of a layer": lambda model, optimizer: model.layers[0].state_dict(),
    "eval": rearm,
    "eval and an evaluation": lambda model, optimizer: (optimizer.eval(), evaluate(model), optimizer.train()),
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "evaluation": lambda model, optimizer: evaluate(model),
    "two evaluations": lambda model, optimizer: (evaluate(model), evaluate(model)),
    "no_grad": lambda model, optimizer: torch.no_grad()(model)(torch.zeros(1, TOKENS, WIDTH, dtype=torch.float64)),
}


def look(case: Case, name: str) -> tuple[Any, list[str]]:
    """`follow` with a look at the weights between every forward and its backward pass, and what that found unclean."""
    held: dict[str, Any] = {}
    found: list[str] = []
    looks = 0

    def expect(what: str, actual: Any, expected: Any) -> None:
        nonlocal looks
        looks += 1
        if any(not torch.equal(one, other) for one, other in zip(actual, expected, strict=True)):
            found.append(what)

    def between(model, optimizer) -> None:
        names = {id(module): name for name, module in model.named_modules()}

        def look_inside(module, *_) -> None:
            for own, parameter in module.named_parameters(recurse=False):
                full = f"{names[id(module)]}.{own}".removeprefix(".")
                expect(full, [whole(parameter)], [held["whole"][full]])

        def zero_grad(*args) -> None:
            expect("in zero_grad", clean_parts(optimizer.base), held["parts"])

        handles = [module.register_forward_pre_hook(look_inside) for module in model.modules()]
        optimizer.base.zero_grad = zero_grad
        answer = LOOKS[name](model, optimizer)
        del optimizer.base.zero_grad
        for handle in handles:
            handle.remove()
        if name in ("eval", "state_dict", "state_dict of a layer"):  # after the others the noise is there again
            expect("after it", clean_parts(optimizer.base), held["parts"])
        if isinstance(answer, dict):
            prefix = "layers.0." if "layer" in name else ""
            expected = {own: value for own, value in held["whole"].items() if own.startswith(prefix)}
            assert [prefix + own for own in answer] == list(expected)
            expect("what it returned", [whole(value) for value in answer.values()], expected.values())

    def ahead(model) -> None:
        for group in gatherers(model):
            group._to_sharded()
        held.update(parts=[part(p) for p in model.parameters()], whole=snapshot(model))

    followed = follow(dataclasses.replace(case, ahead=ahead, between=between))
    return followed, found if looks else ["did not look"]


LOOKED = [
    Case("hsdp", windows=2),
    Case("hsdp", windows=2, sharding={"reshard_after_forward": False}),
    Case("fsdp", 1.0, windows=2),
    Case("fsdp_tp", 1.0, windows=2),
]


@pytest.mark.parametrize(
    "case",
    night(LOOKED, [case for case in LOOKED if case.sharding]),
    ids=lambda case: f"{case.engine} {case.sharding or ''}",
)
def test_whoever_looks_between_the_passes_sees_clean_weights_and_changes_nothing(case):
    plain = run(4, follow, case, keep_group=True)
    for name, ranks in zip(LOOKS, run_each(4, look, [(case, name) for name in LOOKS], keep_group=True), strict=True):
        assert [(name, found) for _, found in ranks] == [(name, [])] * 4
        assert_same([followed for followed, _ in ranks], plain)


class PassError(Exception):
    pass


def fail_first(case: Case, where: str) -> tuple[Any, bool]:
    """`follow` after a step that an exception cut off, and whether that left clean weights at once."""
    model, optimizer, base = build(case)
    clean, (x, y) = clean_parts(base), batch(case, 0)

    def fail(*_) -> None:
        raise PassError

    if where == "forward":
        handle = model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(PassError):
            model(x)
        handle.remove()
    else:  # ahead of any gradient: FSDP2 keeps those of the whole weights, which no zero_grad reaches
        output = model(x)
        output.register_hook(fail)
        with pytest.raises(PassError):
            mse_loss(output, y).backward()
    optimizer.zero_grad()
    clean_at_once = all(map(torch.equal, clean_parts(base), clean))
    if hasattr(model, "reset_iter_state"):  # later than torch 2.8, which goes on without where it can
        model.reset_iter_state()
    return follow_built(case, model, optimizer, base), clean_at_once


@pytest.mark.parametrize("engine", ["hsdp", "fsdp", "hsdp_tp"])
def test_an_exception_in_a_pass_leaves_clean_weights_and_the_next_step_is_right(engine):
    case = Case(engine, windows=2) if engine in PARALLEL else Case(engine, 1.0, windows=2)
    plain = run(4, follow, case, keep_group=True)
    for ranks in run_each(4, fail_first, [(case, where) for where in ("forward", "backward")], keep_group=True):
        assert [clean for _, clean in ranks] == [True] * 4
        assert_same([followed for followed, _ in ranks], plain)
