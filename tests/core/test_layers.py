"""Noise on frozen weights that is drawn where they are read: as the copy mechanism's to the bit, and without a copy."""

import copy
import gc
import io
import re
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import run
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hf_rwp import RWP
from hf_rwp.analysis.timing import peak_bytes
from hf_rwp.core import layers, noise
from hf_rwp.core.draws import Target
from hf_rwp.core.layers import Layers, Noisy
from hf_rwp.core.perturbation import Perturbation
from hf_rwp.core.sharding import block_of


class Adapted(nn.Module):
    """A frozen layer with something trainable after it, as LoRA has it."""

    def __init__(self, layer, out):
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), nn.Parameter(torch.ones(out))

    def forward(self, x):
        y = self.layer(x)
        return y * self.scale.view(-1, *[1] * (y.ndim - 2)) if isinstance(self.layer, CONVS) else y * self.scale


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


class Gpt2Linear(nn.Module):
    """As transformers' Conv1D: its weight is (in, out)."""

    def __init__(self, width, out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Reads(nn.Module):
    """Reads the weights of a layer that it never calls, as BEiT's attention does; and transposed, cast, by parts."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(6, 6).requires_grad_(False), nn.Parameter(torch.ones(6))

    def forward(self, x):
        x = F.linear(x * self.scale, self.inner.weight, self.inner.bias)
        x = x @ self.inner.weight.t() + x @ self.inner.weight.data.T
        x = x @ self.inner.weight.to(x.dtype).contiguous() + F.linear(x, self.inner.weight[:3]).repeat(1, 2)
        norms = torch.linalg.norm(self.inner.weight + self.scale.detach(), dim=1)
        return x * self.scale / norms + self.inner.weight.detach().abs().mean()


def sequence(*modules):
    return nn.Sequential(*modules), torch.randn(4, 6)


def linears():
    return sequence(*[Adapted(nn.Linear(6, 6), 6) for _ in range(3)])


def shared():
    """One layer at two places, the second time on what it gave."""
    layer = Adapted(nn.Linear(6, 6), 6)
    return sequence(layer, nn.Tanh(), layer)


def in_place():
    return sequence(Adapted(nn.Linear(6, 6), 6), nn.ReLU(inplace=True), Adapted(nn.Linear(6, 6), 6))


def attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True).requires_grad_(False)
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x):
            x = x.view(2, 2, 6) * self.scale
            return self.attention(x, x, x)[0]

    return sequence(Attention())


def bilinear():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.Bilinear(6, 6, 5).requires_grad_(False), nn.Parameter(torch.ones(6))

        def forward(self, x):
            return self.inner(x * self.scale, x - self.scale)

    return sequence(Bilinear())


def embedding():
    words = nn.Embedding(9, 6).requires_grad_(False)
    model = nn.Sequential(words, Adapted(nn.Linear(6, 6), 6), nn.Linear(6, 9, bias=False))
    model[2].weight = words.weight  # tied
    return model, torch.arange(8).view(2, 4)


def lstm():
    class Lstm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(6)), nn.LSTM(6, 5).requires_grad_(False)

        def forward(self, x):
            return self.inner(x * self.scale)[0]

    return sequence(Lstm())


def conv(dims):
    def make():
        layer = CONVS[dims - 1]
        model = nn.Sequential(Adapted(layer(2, 4, 3), 4), nn.ReLU(), Adapted(layer(4, 3, 2, groups=1), 3))
        return model, torch.randn(2, 2, *[5] * dims)

    return make


def transposed():
    return nn.Sequential(Adapted(nn.ConvTranspose2d(2, 3, 2), 3), Adapted(nn.Conv2d(3, 2, 2), 2)), torch.randn(
        2, 2, 4, 4
    )


MODELS = {
    "linear": linears,
    "conv1d": conv(1),
    "conv2d": conv(2),
    "conv3d": conv(3),
    "conv_transpose": transposed,
    "embedding, tied": embedding,
    "conv1d of transformers": lambda: sequence(*[Adapted(Gpt2Linear(6, 6), 6) for _ in range(2)]),
    "used twice": shared,
    "changed in place": in_place,
    "two inputs": bilinear,
    "attention": attention,
    "read from outside": lambda: sequence(Reads()),
    "lstm, by a copy": lstm,
}


def targets_of(model):
    named = list(model.named_parameters())
    return [Target(i, n, w, w, block_of(w)) for i, (n, w) in enumerate(named) if not w.requires_grad]


def arguments(model, seed=0, size=0.3):
    targets = targets_of(model)
    return targets, [size] * len(targets), noise.noise_seeds(seed, 1, 1, 0, [target.position for target in targets])


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def passes(model, batch, context=None, autocast=False):
    """One forward and backward pass, and what they gave."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = context(model, batch) if context else model(batch)
        loss = output.float().square().sum()
    loss.backward()
    return output.detach().clone(), gradients(model)


def by_copy(model, batch, noisy=None, **options):
    noisy = noisy or Perturbation()
    noisy.add(*arguments(model))
    try:
        return passes(model, batch, **options)
    finally:
        assert noisy.restore() == []


def drawn(model, batch, **options):
    """The same with noise that is drawn where it is needed, for what it can be drawn for."""
    return by_copy(model, batch, Perturbation(Layers(model)), **options)


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys() != set()
    for name in one[1]:
        assert torch.equal(one[1][name], other[1][name]), name


def in_checkpoints(use_reentrant):
    def run_layers(model, x):
        for module in model:
            if isinstance(module, nn.ReLU) or not x.is_floating_point():
                x = module(x)  # what cannot be computed twice
                continue
            x = x if x.requires_grad or not use_reentrant else x.detach().requires_grad_()
            x = checkpoint(module, x, use_reentrant=use_reentrant)
        return x

    return run_layers


CONTEXTS = {"plain": None, "non-reentrant": in_checkpoints(False), "reentrant": in_checkpoints(True)}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_copy_to_the_bit(name, dtype, context):
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    model.to(dtype)
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    before = copy.deepcopy(model.state_dict())
    clean = passes(model, batch, context=CONTEXTS[context])
    expected = by_copy(model, batch, context=CONTEXTS[context])
    found = drawn(model, batch, context=CONTEXTS[context])
    assert not torch.equal(clean[0], expected[0])
    assert_same(found, expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


def test_autocast_sees_the_noise_of_the_copy():
    model, batch = linears()
    assert_same(drawn(model, batch, autocast=True), by_copy(model, batch, autocast=True))


def test_what_it_works_for_are_frozen_matrices_that_can_be_replaced_wherever_they_are_read():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 3),
            "trained": nn.Linear(3, 3),
            "norm": nn.LayerNorm(3),
            "lstm": nn.LSTM(3, 3),
            "script": torch.jit.script(nn.Linear(3, 3)),
        }
    ).requires_grad_(False)
    model["trained"].requires_grad_(True)
    model["linear"].tied = nn.Linear(2, 2).requires_grad_(False)
    model["linear"].elsewhere = [model["linear"].tied.weight]
    targets = targets_of(model)
    noise_of = Layers(model)
    others, factors, seeds, dampings = noise_of.take(targets, range(99), range(99), None)
    assert [target.name for target in targets if all(target is not other for other in others)] == ["linear.weight"]
    assert (
        list(seeds)
        == [index for index, target in enumerate(targets) if any(target is other for other in others)]
        == list(factors)
    )
    assert dampings is None


# Memory


@pytest.fixture
def live(monkeypatch):
    """How many noisy weights there are, whenever one is drawn."""
    counts, values = [], []
    drawer = layers._drawer

    def counted(*args):
        draw = drawer(*args)

        def drawn():
            own = draw()
            values.append(weakref.ref(own))
            counts.append(sum(value() is not None for value in values))
            return own

        return drawn

    monkeypatch.setattr(layers, "_drawer", counted)
    gc.disable()  # it must not take a collection
    yield counts
    gc.enable()


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"read from outside", "lstm, by a copy"}))
def test_one_weight_is_noisy_at_a_time(name, context, live):
    model, batch = MODELS[name]()
    drawn(model, batch, context=CONTEXTS[context])
    assert len(live) >= sum(parameter.ndim > 1 and not parameter.requires_grad for parameter in model.parameters())
    # Attention is one function of two weights; a backward pass may have the last one at hand while it draws the next
    assert max(live) <= 2


# What goes wrong


class BoomError(Exception): ...


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise BoomError


def raising(where):
    model, batch = linears()
    if where == "forward":
        model[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(BoomError()))
    else:
        model[1].register_forward_hook(lambda _, __, output: Raises.apply(output))
    return model, batch


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_whatever_raises_leaves_the_weights_as_they_were(where, context):
    model, batch = raising(where)
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    with pytest.raises(BoomError):
        drawn(model, batch, context=CONTEXTS[context])
    assert [id(parameter) for parameter in model.parameters()] == list(map(id, parameters))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model[1]._forward_hooks.clear()
    assert_same(drawn(model, batch), by_copy(model, batch))


class Interrupt:
    """Raises KeyboardInterrupt ahead of the line with this number, counted from the first that runs of a module.

    Not ahead of a call that begins a `try` or a `finally`, where Python takes no signal.
    """

    def __init__(self, file, number):
        self.file, self.left = file, number
        lines = Path(file).read_text().splitlines()
        self.safe = {number for number, line in enumerate(lines, 1) if re.search("_(push|pop)_saved_tensors", line)}

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename != self.file:
            return None
        if event == "line" and frame.f_lineno not in self.safe:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        sys.settrace(self)

    def __exit__(self, *_):
        sys.settrace(None)


@pytest.mark.parametrize("context", CONTEXTS)
def test_an_interrupt_at_any_line_leaves_the_weights_as_they_were(context):
    model, batch = sequence(*[Adapted(nn.Linear(6, 6), 6) for _ in range(2)])
    before, parameters = copy.deepcopy(model.state_dict()), list(map(id, model.parameters()))
    expected, number, ended = passes(model, batch, context=CONTEXTS[context]), 0, False
    noisy = Perturbation(Layers(model))
    while not ended:
        number += 1
        try:
            with Interrupt(layers.__file__, number):
                noisy.add(*arguments(model))
                passes(model, batch, context=CONTEXTS[context])
                noisy.restore()
                ended = True
        except KeyboardInterrupt:
            noisy.restore()
        assert list(map(id, model.parameters())) == parameters
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert number > 100
    assert_same(passes(model, batch, context=CONTEXTS[context]), expected)


def shown(model):
    """Noise in a model, to be seen."""
    noisy = Perturbation(Layers(model))
    noisy.add(*arguments(model))
    return noisy


def test_what_is_written_into_a_noisy_weight_is_told():
    class Clamps(nn.Linear):
        def forward(self, x):
            self.weight.data.clamp_(-0.1, 0.1)
            return super().forward(x)

    model = nn.Sequential(nn.Embedding(9, 6, max_norm=0.1), Clamps(6, 6), nn.Linear(6, 6)).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    noisy = shown(model)
    model(torch.arange(4))
    assert sorted(noisy.restore()) == ["0.weight", "1.weight"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert noisy.restore() == []


def test_a_weight_that_changes_between_the_passes_is_an_error():
    model, batch = linears()
    noisy = shown(model)
    output = model(batch)
    noisy.suspend()
    with torch.no_grad():
        model[1].layer.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"1.layer.weight is needed by the backward pass, and was changed"):
        output.sum().backward()
    noisy.restore()


def test_an_activation_that_is_changed_in_place_is_an_error_as_it_is_without_noise():
    model, batch = nn.Sequential(Adapted(nn.Conv1d(2, 2, 1), 2)), torch.randn(1, 2, 4, requires_grad=True)
    noisy = shown(model)
    inputs = batch * 1
    output = model(inputs)
    with torch.no_grad():
        inputs.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        output.sum().backward()
    noisy.restore()


def test_memory_that_is_read_directly_is_refused_by_name_or_is_nan():
    model = nn.Sequential(nn.Linear(6, 6)).requires_grad_(False)
    noisy = shown(model)
    with pytest.raises(NotImplementedError, match=r"memory of 0.weight directly.*frozen=\"copy\""):
        model[0].weight.data_ptr()
    with torch._C.DisableTorchFunctionSubclass():
        assert model[0].weight.isnan().all()
    noisy.restore()


def test_a_stand_in_says_of_itself_what_its_weight_does():
    model = nn.Sequential(nn.Conv2d(2, 3, 3)).requires_grad_(False).to(memory_format=torch.channels_last)
    stored = model[0].weight
    noisy = shown(model)
    weight = model[0].weight
    assert type(weight) is Noisy
    assert isinstance(weight, nn.Parameter)
    for asked in ("shape", "dtype", "device", "requires_grad", "ndim", "is_leaf", "grad", "layout", "itemsize"):
        assert getattr(weight, asked) == getattr(stored, asked), asked
    for asked in ("size", "stride", "numel", "dim", "is_contiguous", "is_floating_point", "element_size"):
        assert getattr(weight, asked)() == getattr(stored, asked)(), asked
    assert len(weight) == len(stored)
    assert weight.to(torch.float32) is weight
    assert torch.equal(copy.deepcopy(weight), stored)
    torch.save(weight, (file := io.BytesIO()))
    file.seek(0)
    assert torch.equal(torch.load(file), stored)
    noisy.restore()
    assert model[0].weight is stored


class Product(torch.autograd.Function):
    """A function of its own that keeps the weight for its backward pass."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient @ weight, None


def test_a_function_with_a_backward_pass_of_its_own_sees_the_same_noise():
    class Custom(nn.Linear):
        def forward(self, x):
            return Product.apply(x, self.weight) + self.bias

    model, batch = sequence(*[Adapted(Custom(6, 6), 6) for _ in range(3)])
    assert_same(drawn(model, batch), by_copy(model, batch))


# With RWP


class Lora(nn.Module):
    """A frozen layer with a low-rank product beside it."""

    def __init__(self, width, rank=2):
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x):
        return torch.tanh(self.base(x) + self.up(self.down(x)))


def lora(width=16, layers=3, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(*[Lora(width) for _ in range(layers)]).to(dtype)


def train(frozen, steps=3, model=None, compiled=None, **options):
    """What training gives: losses, adapters, the base, and what RWP says of it."""
    model = lora() if model is None else model
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    options = {"accumulation_steps": 2, "gamma": 0.1, **options}
    rwp = RWP(torch.optim.SGD(own, lr=0.1, momentum=0.9), model, frozen=frozen, **options)
    generator, losses, call = torch.Generator().manual_seed(1), [], compiled or model
    width = model[0].base.in_features
    for _ in range(steps):
        for _ in range(options["accumulation_steps"]):
            batch = torch.randn(4, width, generator=generator).to(own[0].dtype)
            loss = (call(batch) - batch.roll(1, 1)).square().mean()
            loss.backward()
            losses.append(loss.item())
        rwp.step()
        rwp.zero_grad()
    unchanged = all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    return losses, [parameter.detach().clone() for parameter in own], unchanged, rwp.report()


def assert_same_training(one, other):
    assert one[0] == other[0]
    assert all(map(torch.equal, one[1], other[1]))
    assert one[2]
    assert other[2]
    assert one[3] == other[3]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 1.0, "accumulation_steps": 1},
        {"accumulation_steps": 4, "antithetic": True},
        {"eta": 0.1},
        {"noise": "filter_normalized", "noise_1d": False},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_that_of_the_copy_to_the_bit(options, dtype):
    drawn, copied = (train(frozen, model=lora(dtype=dtype), **options) for frozen in (True, "copy"))
    assert_same_training(drawn, copied)
    assert drawn[0] != train(False, model=lora(dtype=dtype), **options)[0]
    assert drawn[3]["relative_noise"]["largest"]["name"].endswith("base.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_bit_equal_after_a_thousand_steps(dtype):
    losses, _, unchanged, report = train(True, 1000, lora(8, 2, dtype))
    assert unchanged
    assert report["slots"] == {"clean": 1000, "perturbed": 1000}
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("layers_alone", [False, True])
def test_what_is_compiled_sees_the_same_noise(layers_alone):
    found = []
    for frozen in (True, "copy"):
        torch._dynamo.reset()
        model = lora(layers=2)
        for layer in model if layers_alone else ():
            layer.compile(backend="aot_eager")
        whole = None if layers_alone else torch.compile(model, backend="aot_eager")
        found.append(train(frozen, 2, model, whole))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][2]
    assert found[0][3]["slots"] == found[1][3]["slots"]


def test_the_weights_of_the_module_are_the_stored_ones_between_the_passes():
    model = lora()
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rwp = RWP(torch.optim.SGD(own, lr=0.1), model, frozen=True, alpha=1.0, gamma=0.1)
    state, parameters, x = copy.deepcopy(model.state_dict()), list(map(id, model.parameters())), torch.randn(2, 16)
    loss = model(x).square().mean()
    assert list(map(id, model.parameters())) == parameters
    noisy = loss.item()
    model.eval()
    with torch.no_grad():
        clean = model(x).square().mean().item()
    copied, saved = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    model.train()
    assert clean != noisy
    for values in (saved, copied.state_dict()):
        assert all(torch.equal(value, state[name]) for name, value in values.items() if "base" in name)
    loss.backward()  # which an evaluation in between does not change
    gradients = [parameter.grad for parameter in own]
    rwp.zero_grad()
    rwp.remove()

    rwp = RWP(torch.optim.SGD(own, lr=0.1), model, frozen="copy", alpha=1.0, gamma=0.1)
    model(x).square().mean().backward()
    assert not all(map(torch.equal, gradients, [parameter.grad for parameter in own]))  # the next window's noise
    rwp.remove()


def test_two_forward_passes_of_a_micro_step_share_their_noise():
    found = []
    for frozen in (True, "copy"):
        model, x = lora(), torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rwp = RWP(torch.optim.SGD(own, lr=0.1), model, frozen=frozen, alpha=1.0, gamma=0.1)
        one, two = model(x), model(x + 1)
        (one.square().mean() + two.mean()).backward()
        rwp.step()
        found.append([parameter.detach().clone() for parameter in own])
    assert all(map(torch.equal, *found))


def test_a_write_into_a_noisy_base_is_refused_by_name():
    model = nn.Sequential(nn.Embedding(9, 16, max_norm=0.1).requires_grad_(False), Lora(16))
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rwp = RWP(torch.optim.SGD(own, lr=0.1), model, frozen=True, alpha=1.0)
    loss = model(torch.arange(4)).square().mean()
    with pytest.raises(RuntimeError, match=r"something wrote into 0.weight while noise was in it"):
        loss.backward()
    rwp.remove()


def test_frozen_is_true_false_or_copy():
    model = lora()
    with pytest.raises(ValueError, match=r"frozen must be a bool or \"copy\", got 'layers'"):
        RWP(torch.optim.SGD(model[0].up.parameters(), lr=0.1), model, frozen="layers")


@pytest.mark.parametrize("context", CONTEXTS)
def test_it_takes_one_weight_more_than_training_without_noise_on_the_base(context):
    """By the allocator: the most that two steps hold at a time, beyond what there was before."""
    peaks = {}
    for frozen in (False, True, "copy"):
        model, x = lora(512, 4), torch.randn(2, 512)
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rwp = RWP(torch.optim.SGD(own, lr=0.1), model, frozen=frozen, alpha=1.0)

        def step(model=model, x=x, rwp=rwp):
            model(x).square().mean().backward()
            rwp.step()
            rwp.zero_grad()

        if CONTEXTS[context]:
            for layer in model:
                layer.forward = partial(
                    checkpoint, layer.forward, use_reentrant=context == "reentrant", preserve_rng_state=False
                )
            x.requires_grad_()
        peaks[frozen] = peak_bytes(step, torch.device("cpu"))
    one = model[0].base.weight.nbytes
    scratch = 2 * noise.Source(model[0].base.weight).scratch.nbytes
    assert peaks["copy"] - peaks[False] >= 4 * one
    # Writes are looked for in the adapters; twice the weight where a backward pass has one view of it at hand.
    assert peaks[True] - peaks[False] <= 1.25 * one + scratch


def on_rank(frozen, static):
    model = lora()
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    rwp = RWP(torch.optim.SGD(own, lr=0.1, momentum=0.9), model, frozen=frozen, gamma=0.1)
    ddp = DistributedDataParallel(model, static_graph=static)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for _ in range(3):
        x = torch.randn(4, 16, generator=generator)
        (ddp(x) - x.roll(1, 1)).square().mean().backward()
        rwp.step()
        rwp.zero_grad()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    return [parameter.detach().clone() for parameter in own], rwp.report()


@pytest.mark.parametrize("static", [False, True])
def test_replicas_stay_bit_equal_and_train_as_with_the_copy(static):
    drawn, copied, plain = (run(2, on_rank, frozen, static) for frozen in (True, "copy", False))
    assert all(map(torch.equal, drawn[0][0], drawn[1][0]))
    assert all(map(torch.equal, drawn[0][0], copied[0][0]))
    assert not all(map(torch.equal, drawn[0][0], plain[0][0]))
    assert drawn[0][1] == copied[0][1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_training_is_that_of_the_copy_to_the_bit(dtype):
    found = []
    for frozen in (True, "copy"):
        model = lora(512, dtype=dtype).cuda()
        x = torch.randn(64, 512, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(0))
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rwp = RWP(torch.optim.SGD(own, lr=0.1), model, frozen=frozen, alpha=1.0, gamma=0.1)
        for _ in range(3):
            model(x).square().mean().backward()
            rwp.step()
            rwp.zero_grad()
        found.append([parameter.detach() for parameter in own])
    assert all(map(torch.equal, *found))
