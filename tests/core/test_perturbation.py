"""Guarantees 3, 6 and 8 of design.md where noise is written and taken back.

1. Weights are bit-equal after `restore`, in every dtype and layout, whatever bits they hold.
2. `hide` and `show` are bit-exact, unseen by autograd, and keep what was written to the weights between them.
3. Guarded buffers come back: values in place, persistent ones that were replaced by reference.
4. Memory: none before the first noise, one copy and a bounded scratch then, nothing new afterwards.
5. An interrupt between any two bytecodes or copies leaves something that `restore` brings back bit for bit, and no
   thread that goes on writing noise.
"""

import functools
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rwp import foreach, noise, perturbation
from hf_rwp.core.perturbation import Perturbation

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda weight: weight,
    "channels_last": lambda weight: weight.view(4, 8, 3, 3).contiguous(memory_format=torch.channels_last),
    "transposed": lambda weight: weight.view(16, 18).t(),
    "sliced": lambda weight: weight.view(16, 18)[:, 2:9],
    "0-dim": lambda weight: weight[0],
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


def same(tensors: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(bits(one), bits(other)) for one, other in zip(tensors, others, strict=True))


def clones(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]]


def draws(parameters, seed: int = 0, std: float | None = None) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Noise as large as the weights, or of the std given."""
    for position, p in enumerate(parameters):
        yield p, noise.noise_std(p.detach(), 1.0) if std is None else torch.full([1] * p.ndim, std), seed + position


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
    weight = nn.Parameter(LAYOUTS[layout](any_bits(dtype)))
    clean, place, perturbation = bits(weight), (weight.data_ptr(), weight.stride()), Perturbation()
    for seed in range(3):
        perturbation.add(draws([weight], seed, std=0.3))
        assert weight.numel() == 0 or not torch.equal(bits(weight), clean)
        perturbation.hide()
        assert torch.equal(bits(weight), clean)
        perturbation.show()
        perturbation.restore()
        assert torch.equal(bits(weight), clean)
        assert (weight.data_ptr(), weight.stride()) == place


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=5),
    st.lists(st.sampled_from(list(BITS)), min_size=5, max_size=5),
    st.integers(0, 2**32),
    st.floats(1e-6, 1e3),
)
def test_weights_of_any_shape_and_mixed_dtypes_are_bit_equal_after_restore(shapes, dtypes, seed, gamma):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    clean, perturbation = [bits(weight) for weight in weights], Perturbation()
    perturbation.add([(weight, noise.noise_std(weight, gamma), seed) for weight in weights])
    perturbation.restore()
    assert all(torch.equal(bits(weight), before) for weight, before in zip(weights, clean, strict=True))


def test_a_perturbation_replaces_the_one_before():
    model, perturbation = Restless(), Perturbation()
    clean = clones(model)
    perturbation.add(draws(model.parameters(), seed=7))
    noisy = clones(model)
    perturbation.add(draws(model.parameters(), seed=9))
    assert not same(clones(model), noisy)
    perturbation.add(draws(model.parameters(), seed=7))
    assert same(clones(model), noisy)  # a function of the seeds, on clean weights
    perturbation.restore()
    assert same(clones(model), clean)


def test_nothing_happens_without_noise():
    model, perturbation = Restless(), Perturbation()
    clean = clones(model)
    for method in (perturbation.restore, perturbation.hide, perturbation.show, perturbation.restore):
        method()
    assert same(clones(model), clean)
    perturbation.add(draws(model.parameters()))
    perturbation.restore()
    nn.init.ones_(model.linear.weight)
    for method in (perturbation.restore, perturbation.hide, perturbation.show, perturbation.restore):
        method()
    assert (model.linear.weight == 1).all()


def test_weights_outside_the_draws_are_not_touched():
    model, perturbation = Restless(), Perturbation()
    clean = bits(model.linear.bias)
    perturbation.add(draws([model.linear.weight]))
    assert torch.equal(bits(model.linear.bias), clean)
    nn.init.ones_(model.linear.bias)
    perturbation.restore()
    assert (model.linear.bias == 1).all()


def test_noise_is_the_generators_and_leaves_the_global_one_alone():
    weights = [torch.ones(6, 5), torch.ones(6, 5, dtype=torch.bfloat16)]
    expected = []
    for weight, std, seed in draws(weights, seed=3):
        expected.append(weight.clone())
        noise.add_noise_(expected[-1], std, torch.Generator().manual_seed(seed), noise.new_scratch(weight))
    before = torch.get_rng_state()
    Perturbation().add(draws(weights, seed=3))
    assert same(weights, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_changed_its_dtype_is_restored_in_the_new_one():
    model, perturbation = nn.Linear(5, 3), Perturbation()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        nn.init.normal_(model.weight)
        clean = clones(model)
        perturbation.add(draws(model.parameters()))
        perturbation.restore()
        assert same(clones(model), clean)


def test_relative_sizes_are_norms_of_what_is_in_memory():
    model, perturbation = nn.Linear(40, 30).double(), Perturbation()
    clean = model.weight.detach().clone()
    perturbation.add(draws(model.parameters()))
    (size,) = perturbation.relative_sizes([model.weight])
    torch.testing.assert_close(size, (model.weight.detach() - clean).norm() / clean.norm())
    perturbation.restore()


# 2. Hiding


@pytest.mark.parametrize("dtype", BITS)
def test_hide_and_show_are_bit_exact_however_often(dtype):
    weight, perturbation = nn.Parameter(any_bits(dtype)), Perturbation()
    clean = bits(weight)
    perturbation.add(draws([weight], std=0.3))
    noisy = bits(weight)
    for method, expected in [("hide", clean), ("hide", clean), ("show", noisy), ("show", noisy), ("hide", clean)]:
        getattr(perturbation, method)()
        assert torch.equal(bits(weight), expected)
    perturbation.restore()
    perturbation.show()
    assert torch.equal(bits(weight), clean)


def test_hiding_between_forward_and_backward_is_unseen_by_autograd():
    torch.manual_seed(0)
    model, perturbation = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double(), Perturbation()

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(X.double()).square().sum(), list(model.parameters())))

    perturbation.add(draws(model.parameters()))
    expected = gradients()
    loss = model(X.double()).square().sum()
    versions = [parameter._version for parameter in model.parameters()]
    perturbation.hide()
    assert not same(gradients(), expected)
    perturbation.show()
    assert [parameter._version for parameter in model.parameters()] == versions
    assert same(list(torch.autograd.grad(loss, list(model.parameters()))), expected)


def test_a_backward_pass_after_restore_raises_rather_than_use_other_weights():
    model, perturbation = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1)), Perturbation()
    perturbation.add(draws(model.parameters()))
    loss = model(X).sum()
    perturbation.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("ending", ["show", "restore"])
def test_what_is_written_while_hidden_is_kept(ending):
    model, perturbation = nn.Linear(4, 4), Perturbation()
    perturbation.add(draws(model.parameters()))
    noisy = clones(model)
    perturbation.hide()
    nn.init.constant_(model.weight, 3.0)
    if ending == "show":
        perturbation.show()
        assert same(clones(model), noisy)
    perturbation.restore()
    assert (model.weight == 3).all()


def test_autocasts_cached_weights_follow():
    torch.manual_seed(0)
    model, perturbation = nn.Linear(4, 4), Perturbation()
    with torch.autocast("cpu", torch.bfloat16):
        clean = model(X).detach()
        perturbation.add(draws(model.parameters()))
        noisy = model(X).detach()
        assert not torch.equal(noisy, clean)
        for method, expected in [("hide", clean), ("show", noisy), ("restore", clean)]:
            getattr(perturbation, method)()
            assert torch.equal(model(X).detach(), expected)


# 3. Buffers


@pytest.mark.parametrize("hidden", [False, True])
def test_guarded_buffers_are_what_they_were(hidden):
    model, perturbation = Restless(), Perturbation()
    model(X)
    clean, objects = {name: buffer.clone() for name, buffer in model.named_buffers()}, dict(model.named_buffers())
    for _ in range(2):
        perturbation.add(draws(model.parameters()), guarded=model)
        model(X)
        assert not any(torch.equal(buffer, clean[name]) for name, buffer in model.named_buffers())
        scratch = model.replaced_scratch
        (perturbation.hide if hidden else perturbation.restore)()
        for name, buffer in model.named_buffers():
            if name == "replaced_scratch":  # not persistent and replaced: a cache of the module's own
                assert buffer is scratch
            else:
                assert buffer is objects[name]
                assert torch.equal(buffer, clean[name])
        perturbation.restore()
        assert all(torch.equal(clean[name], model.get_buffer(name)) for name in clean if name != "replaced_scratch")
        assert model.nothing is None


def test_unguarded_buffers_keep_what_the_perturbed_pass_wrote():
    model, perturbation = Restless(), Perturbation()
    perturbation.add(draws(model.parameters()))
    model(X)
    written = {name: buffer.clone() for name, buffer in model.named_buffers()}
    perturbation.restore()
    assert written.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, written[name]) for name, buffer in model.named_buffers())
    assert model.norm.num_batches_tracked == 1


def test_buffers_guarded_once_are_not_guarded_the_next_time():
    model, perturbation = Restless(), Perturbation()
    perturbation.add(draws(model.parameters()), guarded=model)
    perturbation.restore()
    perturbation.add(draws(model.parameters()))
    model(X)
    perturbation.restore()
    assert model.norm.num_batches_tracked == 1
    assert (model.replaced == 1).all()


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
    view = perturbation.unexpanded(tensor)
    places = {view[index].data_ptr() for index in itertools.product(*map(range, view.shape))}
    assert len(places) == view.numel() == len(tensor.untyped_storage()) // tensor.element_size()
    view += 1
    assert (tensor == 1).all()


# 4. Memory


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_one_copy_allocated_once(dtype):
    model = nn.Sequential(nn.Linear(900, 900), nn.BatchNorm1d(900)).to(dtype)  # larger than the scratch
    parameters = list(model.parameters())
    everything = sum(tensor.nbytes for tensor in [*parameters, *model.buffers()])
    scratch = noise.new_scratch(parameters[0]).nbytes
    noise._normal_levels(torch.float32)  # the process has one table
    assert parameters[0].nbytes * 4 // parameters[0].element_size() > 3 * scratch

    def allocated(action: Callable[[], object]) -> int:
        with Allocations() as allocations:
            action()
        return allocations.bytes

    assert allocated(Perturbation) == 0
    perturbation, draw = Perturbation(), list(draws(parameters))
    assert allocated(lambda: perturbation.add(draw, guarded=model)) == everything + scratch
    assert allocated(perturbation.hide) == everything
    assert allocated(perturbation.show) == 0
    assert allocated(perturbation.restore) == 0
    copies = [copy.data_ptr() for copy in perturbation._clean.values()]
    for _ in range(2):
        assert allocated(lambda: perturbation.add(draw, guarded=model)) == 0
        assert allocated(perturbation.restore) == 0
    assert [copy.data_ptr() for copy in perturbation._clean.values()] == copies


# 5. Interrupts


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_add_leaves_no_half_of_the_noise(monkeypatch, threads, interrupt):
    model, noisy = Restless(), Perturbation()
    clean, noises, add_noise_ = clones(model), itertools.count(), noise.add_noise_

    def fail_in_the_third(weight: Tensor, *args) -> None:
        add_noise_(weight, *args)
        if next(noises) == 2:
            raise interrupt

    monkeypatch.setattr(noise, "add_noise_", fail_in_the_third)
    with pytest.raises(interrupt):
        noisy.add(draws(model.parameters()), guarded=model)
    assert same(clones(model), clean)


def copy_one_by_one(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def finishes(action: Callable[[], object], after: int) -> bool:
    """Run `action`, interrupted ahead of bytecode number `after` of the modules tested and of `copy_one_by_one`."""
    left = after

    def within(frame, event, _):
        nonlocal left
        if event == "opcode":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return within

    def enter(frame, event, _):
        if (
            frame.f_code.co_filename not in (perturbation.__file__, foreach.__file__)
            and frame.f_code is not copy_one_by_one.__code__
        ):
            return None
        frame.f_trace_opcodes = True
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
    """Two weights, of dtypes that are copied apart, and a buffer for each way back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.low = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("written", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))

    def touch_buffers(self) -> None:
        self.written += 1
        self.replaced = self.replaced + 1


@pytest.mark.parametrize(
    ("before", "interrupted", "written", "threads"),
    [
        ("", "add", False, 1),
        ("add", "add", False, 1),
        ("add hide", "add", False, 1),
        ("add", "hide", False, 1),
        ("add hide", "show", False, 1),
        ("add hide", "show", True, 1),
        ("add", "restore", False, 1),
        ("add hide", "restore", False, 1),
        ("add hide", "restore", True, 1),
        ("add hide show", "restore", False, 1),
        ("", "add", False, 2),
        ("add hide", "add", False, 2),
    ],
    indirect=["threads"],
)
def test_an_interrupt_anywhere_leaves_something_to_restore(monkeypatch, threads, before, interrupted, written):
    """written: weights were written to while hidden, which is to be kept."""
    monkeypatch.setattr(torch, "_foreach_copy_", copy_one_by_one)
    others = threading.active_count()

    def slowly_elsewhere(*args, add_noise_=noise.add_noise_) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.001)
        add_noise_(*args)

    monkeypatch.setattr(noise, "add_noise_", slowly_elsewhere)
    for after in itertools.count():
        model, noisy = Tiny(), Perturbation()
        calls = {name: getattr(noisy, name) for name in ("hide", "show", "restore")}
        calls["add"] = functools.partial(noisy.add, list(draws(model.parameters())), guarded=model)
        clean = clones(model)
        for name in before.split():
            calls[name]()
        if before == "add":
            model.touch_buffers()
        if written:
            nn.init.constant_(model.weight, 3.0)
            clean[0].fill_(3.0)
        finished = finishes(calls[interrupted], after)
        calls["restore"]()
        assert threading.active_count() == others
        assert same(clones(model), clean), f"interrupted after {after} bytecodes"
        for name in ("add", "hide", "show", "restore"):
            calls[name]()
            assert same(clones(model), clean) == (name in ("hide", "restore")), f"{name}, {after} bytecodes before"
        if finished:
            break
    assert after > 10
