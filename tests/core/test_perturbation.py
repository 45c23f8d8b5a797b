"""Guarantees 3, 6 and 8 of hf_rwp/README.md where noise is written and taken back.

1. Weights are bit-equal after `restore`, in every dtype and layout, whatever bits they hold.
2. `suspend` and `resume` are bit-exact, unseen by autograd, and keep what was written to the weights between them.
3. What others write into a noisy weight is noticed, and nothing else is. Copies of a noisy weight are clean.
4. Guarded buffers come back: values in place, persistent ones that were replaced by reference. A failure to restore is
   raised once.
5. Memory: none before the first noise, one copy and a bounded scratch then, nothing new afterwards.
6. An interrupt between any two bytecodes or copies leaves something that `restore` brings back bit for bit.
"""

import copy
import dis
import functools
import io
import itertools
import math
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rwp.core import buffers, draws, noise, perturbation, watch
from hf_rwp.core.buffers import guarded_buffers
from hf_rwp.core.draws import Draws, Target
from hf_rwp.core.perturbation import Noise, Perturbation
from hf_rwp.core.replicas import Replicas
from hf_rwp.core.sharding import block_of

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda weight: weight,
    "channels_last": lambda weight: weight.view(4, 8, 3, 3).contiguous(memory_format=torch.channels_last),
    "transposed": lambda weight: weight.view(16, 18).t(),
    "sliced": lambda weight: weight.view(16, 18)[:, 2:9],
    "0-dim": lambda weight: weight[200],
    "empty": lambda weight: weight[:0].view(0, 3),
}
# -0.0, infinities, NaNs quiet and signalling with payloads, denormals: sign, exponent and mantissa bits by hand
SPECIAL = {
    torch.int64: [-(2**63), 0x7FF0 << 48, -(0x0010 << 48), (0x7FF8 << 48) + 77, (0x7FF0 << 48) + 5, 1, -(2**63) + 3],
    torch.int32: [-(2**31), 0x7F80 << 16, -(0x0080 << 16), (0x7FC0 << 16) + 77, (0x7F80 << 16) + 5, 1, -(2**31) + 3],
    torch.int16: [-(2**15), 0x7C00, 0x7F80, -0x0400, -0x0080, 0x7E4D, 0x7FCD, 0x7C05, 0x7F85, 1, -(2**15) + 3],
}


def any_bits(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """288 elements: the special values first, random bits then, ordinary numbers last."""
    generator = torch.Generator().manual_seed(seed)
    integer = BITS[dtype]
    bounds = torch.iinfo(integer)
    bits = torch.randint(bounds.min, bounds.max, (288,), generator=generator, dtype=integer)
    bits[: len(SPECIAL[integer])] = torch.tensor(SPECIAL[integer], dtype=integer)
    values = bits.view(dtype)
    values[-144:] = torch.randn(144, generator=generator, dtype=torch.float64).to(dtype)
    return values


def bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensor.view(BITS[tensor.dtype]) if tensor.dtype in BITS else tensor


def same(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(torch.equal(bits(one), bits(other)) for one, other in zip(tensors, others, strict=True))


def clones(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]]


def equal(model: nn.Module, others: list[Tensor]) -> bool:
    """A fast `same`, for tensors without special values."""
    return all(map(torch.equal, [*model.parameters(), *model.buffers()], others))


def targets_of(weights: nn.Module | Iterable[Tensor]) -> list[Target]:
    named = (
        weights.named_parameters() if isinstance(weights, nn.Module) else ((f"w{i}", w) for i, w in enumerate(weights))
    )
    return [Target(position, name, weight, weight, block_of(weight)) for position, (name, weight) in enumerate(named)]


def guarded_of(model: nn.Module) -> list[buffers.Guarded]:
    return guarded_buffers(model, Replicas(), 0.5)[0]


def add(
    noisy: Perturbation,
    weights: nn.Module | Iterable[Tensor],
    seed: int = 0,
    size: float = 1.0,
    guarded: nn.Module | None = None,
) -> None:
    """Noise as large as the weights, or `size` times that."""
    targets = targets_of(weights)
    seeds = noise.noise_seeds(seed, 0, 0, 0, range(len(targets)))
    noisy.add(targets, [size] * len(targets), seeds, guarded=guarded_of(guarded) if guarded else ())


class Restless(nn.Module):
    """A forward pass writes to every kind of buffer, in place or by replacement."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("replaced_scratch", torch.zeros(3), persistent=False)
        self.register_buffer("written_scratch", torch.zeros(3), persistent=False)
        self.register_buffer("expanded", torch.zeros(1).expand(3))
        self.register_buffer("expanded_replaced", torch.zeros(1).expand(3))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.replaced = self.replaced + 1
        self.replaced_scratch = self.replaced_scratch + 1
        self.expanded_replaced = self.expanded_replaced + 1
        self.written_scratch += 1
        self.expanded[0] += 1
        return self.norm(self.linear(x))


X = torch.arange(8.0).view(2, 4)


# 1. The way back


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BITS)
def test_weights_are_bit_equal_after_restore(dtype, layout):
    """And nobody is said to have written to them."""
    weight = nn.Parameter(LAYOUTS[layout](any_bits(dtype)))
    clean, place, noisy = bits(weight), (weight.data_ptr(), weight.stride()), Perturbation()
    for seed in range(watch.COMPARISONS + 1):
        add(noisy, [weight], seed)
        assert weight.numel() == 0 or not torch.equal(bits(weight), clean)
        noisy.suspend()
        assert torch.equal(bits(weight), clean)
        noisy.resume()
        assert noisy.restore() == []
        assert torch.equal(bits(weight), clean)
        assert (weight.data_ptr(), weight.stride()) == place


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=5),
    st.lists(st.sampled_from([*BITS, torch.complex64]), min_size=5, max_size=5),
    st.integers(0, 2**32),
    st.floats(1e-6, 1e3),
)
def test_weights_of_any_shape_and_mixed_dtypes_are_bit_equal_after_restore(shapes, dtypes, seed, gamma):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    clean, noisy = [bits(weight) for weight in weights], Perturbation()
    add(noisy, weights, seed, gamma)
    assert noisy.restore() == []
    assert all(torch.equal(bits(weight), before) for weight, before in zip(weights, clean, strict=True))


def test_a_perturbation_replaces_the_one_before():
    model, noisy = Restless(), Perturbation()
    clean = clones(model)
    add(noisy, model, seed=7)
    seventh = clones(model)
    add(noisy, model, seed=9)
    assert not same(clones(model), seventh)
    add(noisy, model, seed=7)
    assert same(clones(model), seventh)  # a function of the seeds, on clean weights
    noisy.restore()
    assert same(clones(model), clean)


def test_nothing_happens_without_noise():
    model, noisy = Restless(), Perturbation()
    clean = clones(model)
    for method in (noisy.restore, noisy.suspend, noisy.resume, noisy.guard_copies, noisy.restore):
        assert not method()
        assert noisy.noise is Noise.ABSENT
    assert same(clones(model), clean)
    assert not vars(model.linear.weight)
    add(noisy, model)
    noisy.restore()
    nn.init.ones_(model.linear.weight)
    for method in (noisy.restore, noisy.suspend, noisy.resume, noisy.restore):
        assert not method()
    assert (model.linear.weight == 1).all()


def test_weights_outside_the_targets_are_not_touched():
    model, noisy = Restless(), Perturbation()
    clean = bits(model.linear.bias)
    add(noisy, [model.linear.weight])
    assert torch.equal(bits(model.linear.bias), clean)
    nn.init.ones_(model.linear.bias)
    assert noisy.restore() == []
    assert (model.linear.bias == 1).all()


def test_noise_is_the_draws_and_leaves_the_global_generator_alone():
    weights, twins = ([torch.ones(6, 5), torch.ones(6, 5, dtype=torch.bfloat16)] for _ in range(2))
    factors, seeds, dampings = [0.5, -0.5], [3, 4], [torch.full((6,), 0.5), None]
    Draws().add_(targets_of(twins), factors, seeds, dampings)
    before, noisy = torch.get_rng_state(), Perturbation()
    noisy.add(targets_of(weights), factors, seeds, dampings)
    assert same(weights, twins)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_clean_values_are_at_hand_while_there_is_noise():
    model, noisy = nn.Linear(4, 4), Perturbation()
    clean = model.weight.detach().clone()
    add(noisy, model)
    assert torch.equal(noisy.values(model.weight)[1], clean)
    assert not torch.equal(model.weight, clean)


def test_a_model_that_changed_its_dtype_is_restored_in_the_new_one():
    model, noisy = nn.Linear(5, 3), Perturbation()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        nn.init.normal_(model.weight)
        clean = clones(model)
        add(noisy, model)
        noisy.restore()
        assert same(clones(model), clean)


# 2. Suspended


@pytest.mark.parametrize("dtype", BITS)
def test_suspend_and_resume_are_bit_exact_however_often(dtype):
    weight, noisy = nn.Parameter(any_bits(dtype)), Perturbation()
    clean = bits(weight)
    add(noisy, [weight])
    dirty = bits(weight)
    for method, expected, result in [
        *[("suspend", clean, True), ("suspend", clean, False), ("resume", dirty, None), ("resume", dirty, None)],
        ("suspend", clean, True),
    ]:
        assert getattr(noisy, method)() is result
        assert torch.equal(bits(weight), expected)
        assert noisy.noise is (Noise.SUSPENDED if method == "suspend" else Noise.SHOWN)
    assert noisy.restore() == []
    noisy.resume()
    assert torch.equal(bits(weight), clean)


def test_suspending_between_forward_and_backward_is_unseen_by_autograd():
    torch.manual_seed(0)
    model, noisy = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double(), Perturbation()

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(X.double()).square().sum(), list(model.parameters())))

    add(noisy, model)
    expected = gradients()
    loss = model(X.double()).square().sum()
    versions = [parameter._version for parameter in model.parameters()]
    noisy.suspend()
    assert not same(gradients(), expected)
    noisy.resume()
    assert [parameter._version for parameter in model.parameters()] == versions
    assert same(torch.autograd.grad(loss, list(model.parameters())), expected)


def test_a_backward_pass_after_restore_raises_rather_than_use_other_weights():
    model, noisy = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1)), Perturbation()
    add(noisy, model)
    loss = model(X).sum()
    noisy.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("ending", ["resume", "restore"])
@pytest.mark.parametrize("through", ["in place", "data"])
def test_what_is_written_while_suspended_is_kept_and_no_fault(ending, through):
    model, noisy = nn.Linear(4, 4), Perturbation()
    for value in range(watch.COMPARISONS + 1):
        clean = model.bias.detach().clone()
        add(noisy, model)
        dirty = clones(model)
        noisy.suspend()
        nn.init.constant_(model.weight, value) if through == "in place" else model.weight.data.fill_(value)
        if ending == "resume":
            noisy.resume()
            assert same(clones(model), dirty)
        assert noisy.restore() == []
        assert (model.weight == value).all()
        assert torch.equal(model.bias, clean)


def test_autocasts_cached_weights_follow():
    torch.manual_seed(0)
    model, noisy = nn.Linear(4, 4), Perturbation()
    with torch.autocast("cpu", torch.bfloat16):
        clean = model(X).detach()
        add(noisy, model)
        dirty = model(X).detach()
        assert not torch.equal(dirty, clean)
        for method, expected in [("suspend", clean), ("resume", dirty), ("restore", clean)]:
            getattr(noisy, method)()
            assert torch.equal(model(X).detach(), expected)


# 3. Writes and copies by others

WRITES: dict[str, Callable[[Tensor], object]] = {
    "clamp_": lambda weight: weight.clamp_(-0.1, 0.1),
    "unit rows": lambda weight: weight.div_(weight.norm()),
    "mask": lambda weight: weight.mul_(torch.arange(weight.numel()).view(weight.shape) % 2),
    "step": lambda weight: weight.add_(torch.ones_like(weight)),
    "one element": lambda weight: weight[(-1,) * weight.ndim].add_(1),
    "slice": lambda weight: weight[-1:].zero_(),
}
WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "small": lambda: torch.randn(6, 4),
    "one filter": lambda: torch.randn(6),
    "large": lambda: torch.randn(3, 20_000),
    "low precision": lambda: torch.randn(6, 4).bfloat16(),
    "complex": lambda: torch.randn(6, 4, dtype=torch.complex64),
    "channels_last": lambda: torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(4, 6).t(),
    "sliced": lambda: torch.randn(6, 9)[:, 2:6],
    "not a number": lambda: torch.full((6, 4), math.nan).index_fill(0, torch.tensor([2, 5]), 1.0),
}


def three(kind: str) -> nn.ParameterDict:
    """Weights of one kind: a, b and c."""
    torch.manual_seed(0)
    return nn.ParameterDict({name: nn.Parameter(WEIGHTS[kind]()) for name in "abc"})


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_write_into_a_noisy_weight_is_noticed_at_any_time(kind, write):
    if (kind, write) in (("complex", "clamp_"), ("not a number", "unit rows")):
        pytest.skip("no such operation")
    weights, noisy = three(kind), Perturbation()
    clean = clones(weights)
    for seed in range(watch.COMPARISONS + 2):
        add(noisy, weights, seed)
        with torch.no_grad():
            WRITES[write](weights["b"])
        assert noisy.restore() == ["b"]
        assert same(clones(weights), clean)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_write_through_data_is_noticed_in_the_first_perturbations(kind):
    weights, noisy = three(kind), Perturbation()
    clean = clones(weights)
    for seed in range(2):
        add(noisy, weights, seed)
        WRITES["slice"](weights["b"].data)
        assert noisy.restore() == ["b"]
        assert same(clones(weights), clean)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_write_that_changes_nothing_is_none(kind):
    weights, noisy = three(kind), Perturbation()
    for seed in range(watch.COMPARISONS + 2):
        add(noisy, weights, seed)
        with torch.no_grad():
            for weight in weights.values():
                weight.mul_(1) if weight.is_complex() else weight.clamp_(-1e9, 1e9)
                weight.copy_(weight.clone())
        assert noisy.restore() == []


def test_a_write_ahead_of_a_suspension_is_said_once_at_the_end():
    weights, noisy = three("small"), Perturbation()
    clean = clones(weights)
    for seed in range(watch.COMPARISONS + 2):
        add(noisy, weights, seed)
        with torch.no_grad():
            weights["b"].zero_()
        for _ in range(2):
            noisy.suspend()
            assert same(clones(weights), clean)
            noisy.resume()
            assert not weights["b"].any()
        assert noisy.restore() == ["b"]
        add(noisy, weights, seed)
        assert noisy.restore() == []
        assert same(clones(weights), clean)


def test_a_weight_that_is_written_to_twice_is_named_once():
    weights, noisy = three("small"), Perturbation()
    clean = clones(weights)
    add(noisy, weights)
    weights["b"].data.zero_()
    noisy.suspend()
    noisy.resume()
    with torch.no_grad():
        weights["b"].add_(1)
    assert noisy.restore() == ["b"]
    assert same(clones(weights), clean)


def test_a_write_that_changes_nothing_is_none_on_either_side_of_a_suspension():
    """As where a forward pass clamps, and checkpointing runs it again."""
    weights, noisy = three("small"), Perturbation()
    for seed in range(watch.COMPARISONS + 2):
        add(noisy, weights, seed)
        for method in (noisy.suspend, noisy.resume, noisy.restore):
            with torch.no_grad():
                if method != noisy.resume:
                    weights["b"].clamp_(-1e9, 1e9)
            found = method()
        assert found == []


def test_a_write_after_a_suspension_is_noticed():
    weights, noisy = three("small"), Perturbation()
    clean = clones(weights)
    add(noisy, weights)
    noisy.suspend()
    with torch.no_grad():
        weights["a"].fill_(7)
    noisy.resume()
    with torch.no_grad():
        weights["b"].zero_()
    assert noisy.restore() == ["b"]
    assert same(clones(weights), [torch.full((6, 4), 7.0), *clean[1:]])


COPIES: dict[str, Callable[[nn.Module], Iterable[Tensor]]] = {
    "deepcopy of the model": lambda model: clones(copy.deepcopy(model)),
    "deepcopy of a weight": lambda model: [copy.deepcopy(model[0].weight)],
    "deepcopy of a list": lambda model: copy.deepcopy(list(model.parameters())),
    "pickle of the model": lambda model: clones(pickle.loads(pickle.dumps(model))),
    "pickle of a weight": lambda model: [pickle.loads(pickle.dumps(model[0].weight))],
    "torch.save": lambda model: clones(saved(model)),
}


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_noisy_weight_is_clean_and_suspends_the_noise(how):
    model, noisy = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), Perturbation()
    model[0].weight.mark = "of a user"
    clean = clones(model)
    add(noisy, model, guarded=model)
    model(X)
    dirty = clones(model)
    for _ in range(2):
        noisy.guard_copies()
        assert noisy.noise is Noise.SHOWN
        copies = list(COPIES[how](model))
        assert same(copies, clean[: len(copies)])
        assert noisy.noise is Noise.SUSPENDED
        assert vars(model[0].weight) == {"mark": "of a user"}
        noisy.resume()
        assert same(clones(model), dirty)
    assert noisy.restore() == []
    assert same(clones(model), clean)


@pytest.mark.parametrize("ending", ["suspend", "resume", "restore", "add"])
def test_copies_are_guarded_until_the_noise_goes(ending):
    model, noisy = nn.Linear(4, 4), Perturbation()
    add(noisy, model)
    noisy.guard_copies()
    twin = copy.copy(model.weight.detach())
    assert torch.equal(twin, model.weight)
    add(noisy, model) if ending == "add" else getattr(noisy, ending)()
    assert not any(vars(parameter) for parameter in model.parameters())
    shown = noisy.noise
    assert same(clones(copy.deepcopy(model)), clones(model))
    assert noisy.noise is shown


# 4. Buffers, and what cannot be restored


@pytest.mark.parametrize("suspended", [False, True])
def test_guarded_buffers_are_what_they_were(suspended):
    model, noisy = Restless(), Perturbation()
    model(X)
    clean, objects = {name: buffer.clone() for name, buffer in model.named_buffers()}, dict(model.named_buffers())
    for _ in range(2):
        add(noisy, model, guarded=model)
        model(X)
        assert not any(torch.equal(buffer, clean[name]) for name, buffer in model.named_buffers())
        scratch = model.replaced_scratch
        (noisy.suspend if suspended else noisy.restore)()
        for name, buffer in model.named_buffers():
            if name == "replaced_scratch":  # not persistent and replaced: a cache of the module's own
                assert buffer is scratch
            else:
                assert buffer is objects[name]
                assert torch.equal(buffer, clean[name])
        noisy.restore()
        assert all(torch.equal(clean[name], model.get_buffer(name)) for name in clean if name != "replaced_scratch")
        assert model.nothing is None


def test_unguarded_buffers_keep_what_the_perturbed_pass_wrote():
    model, noisy = Restless(), Perturbation()
    add(noisy, model)
    model(X)
    written = {name: buffer.clone() for name, buffer in model.named_buffers()}
    noisy.restore()
    assert written.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, written[name]) for name, buffer in model.named_buffers())
    assert model.norm.num_batches_tracked == 1


def test_buffers_guarded_once_are_not_guarded_the_next_time():
    model, noisy = Restless(), Perturbation()
    add(noisy, model, guarded=model)
    noisy.restore()
    add(noisy, model)
    model(X)
    noisy.restore()
    assert model.norm.num_batches_tracked == 1
    assert (model.replaced == 1).all()


@pytest.mark.parametrize(
    ("replicas", "alpha", "guarded", "updated"),
    [
        (Replicas(), 0.5, "all", ""),
        (Replicas(), 1, "", "floating"),
        (Replicas(1, 2, broadcasts_buffers=True), 0.5, "floating", ""),
        (Replicas(0, 2, broadcasts_buffers=True), 1, "", "floating"),
        (Replicas(1, 2, broadcasts_buffers=True), 1, "floating", ""),
        (Replicas(1, 2), 0.5, "", "floating"),
        (Replicas(0, 2), 1, "", "floating"),
        (Replicas(1, 2), 1, "", "floating"),
    ],
)
def test_clean_slots_alone_update_buffers_where_some_replica_has_them(replicas, alpha, guarded, updated):
    norm = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    names = {"": [], "floating": ["running_mean", "running_var"]}
    names["all"] = [*names["floating"], "num_batches_tracked"]
    found = guarded_buffers(norm, replicas, alpha)
    assert [[name for _, name, _ in entries] for entries in found] == [names[guarded], names[updated]]
    assert all(
        module is norm[0] and buffer is norm[0]._buffers[name] for module, name, buffer in [*found[0], *found[1]]
    )


def test_a_cache_is_not_taken_for_statistics():
    net = nn.Linear(4, 4)
    net.register_buffer("frequencies", torch.ones(2), persistent=False)
    assert guarded_buffers(net, Replicas(1, 2), 0.5) == ([], [])


class Lazy(nn.Module):
    """Lays out its statistics in the first pass: by another tensor, in the same one, in the same one's storage."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        for name in ("replaced", "resized", "data", "missing"):
            self.register_buffer(name, None if name == "missing" else torch.zeros(1))
        self.register_buffer("shrunk", torch.zeros(4))
        self.register_buffer("laid", torch.zeros(2, 3))

    def forward(self, x):
        self.replaced = torch.arange(5.0)
        self.resized.resize_(5).copy_(torch.arange(5.0))
        self.data.data = torch.arange(5.0)
        self.missing = torch.arange(5.0)
        self.shrunk.resize_(2).copy_(torch.arange(2.0))
        self.laid.data = torch.arange(6.0).view(3, 2).t()
        return self.linear(x)


@pytest.mark.parametrize(
    "methods", ["restore", "suspend", "suspend resume", "suspend restore", "suspend resume restore"]
)
def test_a_buffer_that_a_pass_lays_out_anew_keeps_its_shape(methods):
    model, noisy = Lazy(), Perturbation()
    clean = [parameter.detach().clone() for parameter in model.parameters()]
    add(noisy, model, guarded=model)
    model(X)
    dirty = [parameter.detach().clone() for parameter in model.parameters()]
    for method in methods.split():
        getattr(noisy, method)()
        assert same(model.parameters(), dirty if method == "resume" else clean)
        for name in ("replaced", "resized", "data", "missing"):
            assert model.get_buffer(name).tolist() == [0, 1, 2, 3, 4]
        assert model.shrunk.tolist() == [0, 1]
        if method != "resume":
            assert not model.laid.any()
    assert noisy.restore() == []
    add(noisy, model, guarded=model)
    model(X)
    noisy.restore()
    assert same(model.parameters(), clean)


@pytest.mark.parametrize("suspends", [False, True])
def test_a_failure_to_restore_is_raised_once_and_the_rest_is_clean(suspends):
    model, noisy = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)), Perturbation()
    clean = clones(model)
    add(noisy, model, guarded=model)
    model(X)
    model[1].weight.data = torch.ones(2, 2)
    if suspends:
        with suppress(RuntimeError):
            noisy.suspend()
        noisy.resume()
    with pytest.raises(RuntimeError, match=r"shape \(4, 4\) has shape \(2, 2\) now"):
        noisy.restore()
    assert noisy.noise is Noise.ABSENT
    for _ in range(2):
        assert noisy.restore() == []
        assert not noisy.suspend()
        assert same(clones(model)[:2] + clones(model)[3:], clean[:2] + clean[3:])
        assert (model[1].weight == 1).all()
        add(noisy, model, guarded=model)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(3),
        torch.zeros(2, 1).expand(2, 3),
        torch.zeros(1, 2, 1).expand(4, 2, 5),
        torch.zeros(2, 1).expand(2, 1),
        torch.zeros(3, 4).t(),
        torch.zeros(()),
    ],
)
def test_unexpanded_is_all_of_the_memory_once(tensor):
    view = buffers.unexpanded(tensor)
    places = {view[index].data_ptr() for index in itertools.product(*map(range, view.shape))}
    assert len(places) == view.numel() == len(tensor.untyped_storage()) // tensor.element_size()
    view += 1
    assert (tensor == 1).all()


# 5. Memory


class Allocations(TorchDispatchMode):
    """Counts the bytes of new storages while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors([args, kwargs or {}])}
        for tensor in _tensors(result):
            if tensor.untyped_storage().data_ptr() not in known:
                self.bytes += tensor.untyped_storage().nbytes()
        return result


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def allocated(action: Callable[[], object]) -> int:
    with Allocations() as allocations:
        action()
    return allocations.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_one_copy_allocated_once(dtype):
    """But for a few rows at a time while weights are compared, in the first perturbations."""
    model = nn.Sequential(nn.Linear(900, 900), nn.BatchNorm1d(900)).to(dtype)  # larger than the scratch
    parameters = list(model.parameters())
    everything, weights = (sum(t.nbytes for t in tensors) for tensors in ([*parameters, *model.buffers()], parameters))
    scratch, stds = 2**15 * 4, (900 + 3 + 3) * 4  # float32; those of weights that are one filter are stacked
    assert parameters[0].nbytes * 4 // parameters[0].element_size() > 3 * scratch

    assert allocated(Perturbation) == 0
    noisy, targets, guarded = Perturbation(), targets_of(model), guarded_of(model)
    begin = functools.partial(noisy.add, targets, [1.0] * 4, [1, 2, 3, 4], None, guarded)
    assert allocated(begin) == everything + scratch + stds
    assert allocated(noisy.suspend) == everything + weights
    assert allocated(noisy.resume) == 0
    assert allocated(noisy.restore) == 0
    copies = [noisy.values(parameter)[1].data_ptr() for parameter in parameters]
    for seed in range(1, watch.COMPARISONS + 2):
        assert allocated(begin) == stds
        assert allocated(noisy.restore) == (weights if seed < watch.COMPARISONS else 0)
    assert [noisy.values(parameter)[1].data_ptr() for parameter in parameters] == copies


# 6. Interrupts


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_add_leaves_no_half_of_the_noise(monkeypatch, interrupt):
    model, noisy = Restless(), Perturbation()
    model.large = nn.Linear(300, 200)
    clean, draw = clones(model), noise.Source.fill_

    def fail_after(source, before, *args) -> Tensor:
        if next(numbers) == before:
            raise interrupt
        return draw(source, *args)

    for before in (3, 6):  # of the small weights, and of the large one
        numbers = itertools.count()
        monkeypatch.setattr(noise.Source, "fill_", functools.partialmethod(fail_after, before))
        with pytest.raises(interrupt):
            add(noisy, model, guarded=model)
        assert same(clones(model), clean)
        monkeypatch.undo()
        add(noisy, model, guarded=model)
        assert noisy.restore() == []
        assert same(clones(model), clean)


def copy_one_by_one(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


FILES = {module.__file__ for module in (perturbation, draws, watch, buffers)}
# Bytecodes that change nothing but the stack.
IDLE = ("LOAD_", "PUSH_NULL", "PRECALL", "KW_NAMES", "BUILD_", "COMPARE_OP", "IS_OP", "CONTAINS_OP", "POP_JUMP")


@functools.cache
def places(code: types.CodeType) -> frozenset[int]:
    """Where to interrupt: ahead of every bytecode, but not behind an idle one: there all is as it was ahead of that."""
    instructions = list(dis.get_instructions(code))
    return frozenset(
        now.offset
        for before, now in itertools.pairwise([None, *instructions])
        if before is None or now.is_jump_target or not before.opname.startswith(IDLE)
    )


def finishes(action: Callable[[], object], after: int) -> bool:
    """Run `action`, interrupted at place number `after` of the modules tested and of `copy_one_by_one`."""
    left = after

    def enter(frame, event, _):
        if frame.f_code.co_filename not in FILES and frame.f_code is not copy_one_by_one.__code__:
            return None
        own = places(frame.f_code)

        def within(frame, event, _):
            nonlocal left
            if event == "opcode" and frame.f_lasti in own:
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
            return within

        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return within

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        action()
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(before)
    return True


class Tiny(nn.Module):
    """Two weights, of dtypes that are copied and drawn apart, and a buffer for each way back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.low = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("written", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))

    def touch_buffers(self) -> None:
        self.written += 1
        self.replaced = self.replaced + 1


@pytest.mark.skipif(sys.version_info[:3] == (3, 13, 0), reason="misses bytecodes of functions that ran before")
@pytest.mark.parametrize(
    ("before", "interrupted", "with_"),
    [
        ("", "add", ""),
        ("add", "add", ""),
        ("add suspend", "add", ""),
        ("add", "guard", ""),
        ("add guard", "suspend", "comparisons"),
        ("add guard", "copy", ""),
        ("add suspend", "resume", ""),
        ("add suspend", "resume", "writes"),
        ("add guard", "restore", "comparisons"),
        ("add suspend", "restore", ""),
        ("add suspend", "restore", "writes"),
        ("add suspend resume", "restore", ""),
    ],
)
def test_an_interrupt_anywhere_leaves_something_to_restore(monkeypatch, before, interrupted, with_):
    """And no word of writes that nobody made. with writes: to weights while suspended, which are to be kept."""
    monkeypatch.setattr(watch, "COMPARISONS", int(with_ == "comparisons"))
    monkeypatch.setattr(torch, "_foreach_copy_", copy_one_by_one)
    for after in itertools.count():
        model, noisy = Tiny(), Perturbation()
        calls = {name: getattr(noisy, name) for name in ("suspend", "resume", "restore")}
        calls["add"] = functools.partial(noisy.add, targets_of(model), [1.0, 1.0], [1, 2], guarded=guarded_of(model))
        calls |= {"guard": noisy.guard_copies, "copy": functools.partial(copy.deepcopy, model)}
        clean = clones(model)
        for name in before.split():
            calls[name]()
        if before.startswith("add") and "suspend" not in before:
            model.touch_buffers()
        if with_ == "writes":
            nn.init.constant_(model.weight, 3.0)
            clean[0].fill_(3.0)
        noisy_weights = [parameter.detach().clone() for parameter in model.parameters()]
        finished = finishes(calls[interrupted], after)
        if interrupted in ("copy", "suspend"):
            calls["resume"]()  # as a backward pass does
            assert all(map(torch.equal, model.parameters(), noisy_weights)), f"interrupted at place {after}"
        assert calls["restore"]() == [], f"interrupted at place {after}"
        assert equal(model, clean), f"interrupted at place {after}"
        assert not any(vars(parameter) for parameter in model.parameters())
        for name in ("add", "suspend", "resume", "restore"):
            calls[name]()
            assert equal(model, clean) == (name in ("suspend", "restore")), (
                f"{name}, interrupted at place {after} before"
            )
        if finished:
            break
    assert after > 10
