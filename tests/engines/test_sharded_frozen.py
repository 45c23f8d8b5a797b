"""Noise on a frozen base that FSDP2 shards: drawn after the gather of a layer, the same as in one process, no copy."""

import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from distributed import run, run_each
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rwp import RWP
from hf_rwp.core import layers
from hf_rwp.core.layers import Noisy
from hf_rwp.core.sharding import gatherers, reshard

STEPS = 3


class Lora(nn.Module):
    """A frozen layer with a low-rank product beside it."""

    def __init__(self, width, rank=2):
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x):
        return torch.tanh(self.base(x) + self.up(self.down(x)))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(*[Lora(6) for _ in range(3)])


def tied():
    """The last layer has the first one's frozen weight, and the whole model a head of its own."""
    model = plain()
    model[2].base.weight = model[0].base.weight
    return model


def llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    own = LlamaConfig(vocab_size=32, bos_token_id=1, eos_token_id=2, num_key_value_heads=2, **sizes)
    names = ["q_proj", "v_proj", "up_proj"]
    model = get_peft_model(LlamaForCausalLM(own), LoraConfig(r=2, target_modules=names, **options))
    for name, weight in model.named_parameters():  # lora_B begins as zeros
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model.train()


def in_checkpoints(reentrant):
    model = llama()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


MODELS = {
    "plain": plain,
    "tied": tied,
    "lora": llama,
    "dora": partial(llama, use_dora=True),
    "non-reentrant": partial(in_checkpoints, False),
    "reentrant": partial(in_checkpoints, True),
}


def sharded(model, mesh, **options):
    blocks = model if isinstance(model, nn.Sequential) else model.base_model.model.model.layers
    for block in blocks if not isinstance(model, nn.Sequential) or len({*map(id, weights(model))}) > 2 else ():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def weights(model):
    return [layer.base.weight for layer in model]


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def loss_of(model, generator):
    if isinstance(model, nn.Sequential):
        x = torch.randn(4, 6, generator=generator).to(next(model.parameters()).dtype)
        return (model(x) - x.roll(1, 1)).square().mean()
    ids = torch.randint(3, 32, (2, 8), generator=generator)
    return model(input_ids=ids, labels=ids).loss


def train(model, frozen, between=None, steps=STEPS, **options):
    """Losses, adapters, what is copied, and what RWP says of it; the base is the same, bit for bit."""
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = {name: whole(p) for name, p in model.named_parameters() if not p.requires_grad}
    options = {"gamma": 0.1, "accumulation_steps": 2, **options}
    rwp = RWP(torch.optim.SGD(own, lr=0.1, momentum=0.9), model, frozen=frozen, **options)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        for _ in range(options["accumulation_steps"]):
            loss = loss_of(model, generator)
            if between:
                between(model, rwp)
            loss.backward()
            losses.append(loss.item())
        rwp.step()
        rwp.zero_grad()
    for name, parameter in model.named_parameters():
        assert type(parameter) is not Noisy
        assert name not in base or torch.equal(whole(parameter), base[name]), name
    copied = sum(clean.numel() for clean in rwp._windows.perturbation._clean)
    return losses, [whole(parameter) for parameter in own], copied, rwp.report()


def on_ranks(name, frozen, dtype=torch.float64, between=None, **sharding):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return train(sharded(MODELS[name]().to(dtype), mesh, **sharding), frozen, between)


def assert_same_training(one, other, tolerance=1e-12):
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    torch.testing.assert_close(one[1], other[1], rtol=tolerance, atol=tolerance)
    assert one[3]["slots"] == other[3]["slots"]
    for kind, size in other[3]["relative_noise"].items():
        assert one[3]["relative_noise"][kind]["size"] == pytest.approx(size["size"], rel=max(tolerance, 1e-6))


@pytest.mark.parametrize("name", MODELS)
def test_training_is_that_of_one_process_and_keeps_no_copy_of_the_base(name):
    drawn, copied, without = run_each(2, on_ranks, [(name, frozen) for frozen in (True, "copy", False)], timeout=120)
    expected = train(MODELS[name]().double(), True)
    for rank in (*drawn, *copied):
        assert_same_training(rank, expected)
    assert drawn[0][0] != pytest.approx(without[0][0], rel=1e-6)
    frozen = [parameter for parameter in MODELS[name]().parameters() if not parameter.requires_grad]
    base = sum(parameter.numel() for parameter in frozen if parameter.ndim > 1)
    assert sum(rank[2] for rank in copied) - sum(rank[2] for rank in drawn) == base  # of the shards
    assert drawn[0][0] == drawn[1][0]


def look_and_compare(frozen):
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for between in (None, evaluate):
        found.append(train(sharded(llama().double(), mesh), frozen, between))
    return found


def evaluate(model, rwp):
    """Between the passes, in eval mode, of the clean weights; whose state is then asked for."""
    own = [parameter.detach() for parameter in model.parameters()]
    model.eval()
    with torch.no_grad():
        loss_of(model, torch.Generator().manual_seed(5))
    model.train()
    assert type(model.state_dict()[next(name for name in model.state_dict() if "base_layer" in name)]) is not Noisy
    assert len(own) == len(list(model.parameters()))


def test_an_evaluation_between_the_passes_sees_the_clean_base_and_changes_no_bit():
    for plainly, looked in run(2, look_and_compare, True):
        assert plainly[0] == looked[0]
        assert all(map(torch.equal, plainly[1], looked[1]))


LAYOUTS = {
    "kept gathered": {"reshard_after_forward": False},
    "asked for ahead of time": {},
    "in host memory": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "low precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    "low precision, as the base is held": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
}


def held_low(model):
    """As accelerate's FSDP2 has a base in bfloat16: what is trained is held in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    return model


def in_layouts(layout):
    mesh = init_device_mesh("cpu", (2,))
    make = held_low if "held" in layout else lambda model: model
    found = []
    for frozen in (True, "copy"):
        model = sharded(make(plain()), mesh, **LAYOUTS[layout])
        for one, other in itertools.pairwise(model) if "ahead" in layout else ():
            one.set_modules_to_forward_prefetch([other])
            other.set_modules_to_backward_prefetch([one])
        found.append(train(model, frozen))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_fsdp2_see_the_noise_of_the_shards(layout):
    """What is gathered in another dtype than it is held in is perturbed as shards, in that which it is held in."""
    for drawn, copied in run(2, in_layouts, layout):
        assert drawn[0] == pytest.approx(copied[0], rel=1e-6)
        torch.testing.assert_close(drawn[1], copied[1], rtol=1e-6, atol=1e-6)
        assert (drawn[2] == copied[2]) == (layout == "low precision")


class BoomError(Exception): ...


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise BoomError


def raising(where):
    """The base after an exception in a pass, its difference, and whether FSDP2 is left as it was."""
    model = sharded(plain(), init_device_mesh("cpu", (2,)))
    before = [whole(parameter) for parameter in model.parameters()]
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rwp = RWP(torch.optim.SGD(own, lr=0.1), model, frozen=True, alpha=1.0, gamma=0.1)
    if where == "forward":
        handle = model[1].up.register_forward_hook(lambda *_: (_ for _ in ()).throw(BoomError()))
    else:
        handle = model[1].up.register_forward_hook(lambda _, __, output: Raises.apply(output))
    generator = torch.Generator().manual_seed(1)
    with pytest.raises(BoomError):
        loss_of(model, generator).backward()
    handle.remove()
    rwp.disarm()
    held = [held for group in gatherers(model) for held in group.fsdp_params]
    left = [one for one in held if "_setattr_on_modules" in vars(one)]
    reshard(gatherers(model))
    kinds = {type(parameter) for parameter in model.parameters()}
    same = all(map(torch.equal, before, [whole(parameter) for parameter in model.parameters()]))
    if where == "backward":  # FSDP2 by itself ends no backward pass after that
        return same, left, kinds
    rwp.train()
    loss_of(model, generator).backward()
    assert all(whole(parameter.grad).isfinite().all() for parameter in own)
    return same, left, kinds


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_a_pass_leaves_the_base_and_fsdp2_as_they_were(where):
    for same, left, kinds in run(2, raising, where):
        assert same
        assert left == []
        assert kinds == {DTensor}


def count_noisy():
    """How many noisy weights there are at most, of how many draws."""
    counts, values, drawer = [], [], layers._drawer

    def counted(*args):
        draw = drawer(*args)

        def drawn():
            own = draw()
            values.append(weakref.ref(own))
            counts.append(sum(value() is not None for value in values))
            return own

        return drawn

    layers._drawer = counted
    gc.disable()  # it must not take a collection
    try:
        train(sharded(in_checkpoints(False), init_device_mesh("cpu", (2,))), True, steps=1)
    finally:
        gc.enable()
        layers._drawer = drawer
    return max(counts), len(counts)


def test_one_weight_is_noisy_at_a_time():
    weights = sum(p.ndim > 1 and not p.requires_grad for p in llama().parameters())
    for most, draws in run(2, count_noisy):
        assert most <= 2  # a backward pass may have the last one at hand while it draws the next
        assert draws > 2 * weights - 4


def on_replicas(frozen):
    """HSDP of two replicas of one process each: the odd one is perturbed."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    return train(sharded(plain().double(), mesh), frozen, accumulation_steps=1)


def ddp(frozen):
    model = plain().double()
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rwp = RWP(torch.optim.SGD(own, lr=0.1, momentum=0.9), model, frozen=frozen, gamma=0.1)
    wrapped, generator, losses = nn.parallel.DistributedDataParallel(model), torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        x = torch.randn(4, 6, generator=generator).double()
        loss = (wrapped(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        losses.append(loss.item())
        rwp.step()
        rwp.zero_grad()
    return losses, [whole(parameter) for parameter in own]


def test_replicas_of_shards_train_as_those_of_ddp():
    for sharded_run, plain_run in zip(run(2, on_replicas, True), run(2, ddp, True), strict=True):
        assert sharded_run[0] == pytest.approx(plain_run[0], rel=1e-12)
        torch.testing.assert_close(sharded_run[1], plain_run[1], rtol=1e-12, atol=1e-12)
