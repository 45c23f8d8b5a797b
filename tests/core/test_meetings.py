"""Where RWP meets what it did not make: models that write their own weights, other wrappers, copies, other parameters.

What is right is right to the bit; what cannot be is refused by name, on the first step, and leaves nothing behind.
"""

import copy
import gc
import io
import logging
import pickle

import pytest
import torch
from reference import noises, seen_weights, snapshot
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from hf_rwp import RWP


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        nn.init.normal_(model[1].bias)
    return model.double()


def inputs(count=1, seed=0):
    return list(torch.randn(count, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def wrap(model, base=None, **options):
    base = base or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return RWP(base, model, **{"gamma": 0.3, "alpha": 1.0, **options})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(model, optimizer, steps=1, seed=0):
    for x in inputs(steps, seed):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# What others write into a perturbed weight is never lost without a word.


class Writing(nn.Module):
    """Changes its weights in its own forward pass, as `write` says."""

    def __init__(self, write):
        super().__init__()
        self.net, self.write = network(), write

    def forward(self, x):
        self.write(self.net[0].weight)
        return self.net(x)


@torch.no_grad()
def clamp(weight):
    weight.clamp_(-0.1, 0.1)


@torch.no_grad()
def unit_rows(weight):
    weight.div_(weight.norm(dim=1, keepdim=True))


def mask_data(weight):
    weight.data[:, ::2] = 0.0


def replace_data(weight):
    weight.data.copy_(weight.data * 0.5)


WRITES = {"clamp_": clamp, "unit-norm rows": unit_rows, "a mask": mask_data, "copy_ through .data": replace_data}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_forward_pass_that_writes_into_its_weights_is_refused_on_the_first_step(write, alpha):
    model, (first, second) = Writing(write), inputs(2)
    optimizer = wrap(model, alpha=alpha, accumulation_steps=2)
    if alpha < 1:
        model(first).square().sum().backward()  # at clean weights a write is nobody's business
    clean = snapshot(model)
    with pytest.raises(RuntimeError, match=r"net\.0\.weight.*after optimizer\.step\(\).*parametrize"):
        model(second).square().sum().backward()
    assert same(snapshot(model), clean)
    optimizer.remove()


def test_an_embedding_that_renormalizes_its_rows_is_refused_where_it_does():
    def build(max_norm):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 4, max_norm=max_norm), nn.Flatten(), nn.Linear(8, 2)).double()

    x = torch.tensor([[0, 3], [5, 3]])
    model = build(max_norm=1.0)
    optimizer = wrap(model)
    with pytest.raises(RuntimeError, match=r"0\.weight.*Embedding\(max_norm=\)"):
        model(x).sum().backward()
    optimizer.remove()
    model = build(max_norm=1e3)  # the version moves at each pass, the values do not
    optimizer = wrap(model)
    for _ in range(4):
        model(x).sum().backward()
        optimizer.step()
    assert optimizer.report()["slots"]["perturbed"] == 4


@pytest.mark.parametrize("first", range(4))
def test_writes_that_begin_later_are_refused_when_they_begin(first):
    model = Writing(lambda weight: clamp(weight) if len(steps) == first else None)
    optimizer, steps = wrap(model), []
    while len(steps) < first:
        train(model, optimizer)
        steps.append(None)
    with pytest.raises(RuntimeError, match=r"net\.0\.weight"):
        train(model, optimizer)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_an_optimizer_that_steps_inside_the_backward_pass_is_refused_on_the_first_step(alpha):
    model = network()
    optimizer = wrap(model, alpha=alpha, accumulation_steps=2)
    layerwise = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step_at_once(parameter):
        layerwise[parameter].step()
        parameter.grad = None

    for p in layerwise:
        p.register_post_accumulate_grad_hook(step_at_once)
    first, second = inputs(2)
    if alpha < 1:
        model(first).square().sum().backward()
    loss = model(second).square().sum()
    with pytest.raises(RuntimeError, match=r"wrote into .*layerwise GaLore"):
        loss.backward()
    optimizer.eval()
    optimizer.remove()


def test_the_wrapper_itself_does_not_step_inside_the_backward_pass():
    model = network()
    optimizer = wrap(model)
    model[0].weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    clean = snapshot(model)
    with pytest.raises(RuntimeError, match="inside a backward pass"):
        model(inputs()[0]).sum().backward()
    optimizer.eval()
    assert same(snapshot(model), clean)


def test_a_write_that_an_evaluation_in_between_would_hide_is_said_all_the_same():
    model = Writing(clamp)
    optimizer = wrap(model)
    loss = model(inputs()[0]).sum()
    model.state_dict()
    with pytest.raises(RuntimeError, match=r"net\.0\.weight"):
        loss.backward()
    optimizer.remove()


def test_a_write_after_one_between_the_passes_is_said_too_and_that_one_is_kept():
    model = network()
    optimizer = wrap(model)
    for _ in range(3):  # beyond the passes in which every weight is compared
        train(model, optimizer)
    loss = model(inputs()[0]).sum()
    optimizer.eval()
    nn.init.constant_(model[0].weight, 2.0)  # as a framework that swaps weights for an evaluation
    optimizer.train()
    model[0].weight.register_post_accumulate_grad_hook(clamp)
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        loss.backward()
    assert (model[0].weight == 2).all()
    optimizer.remove()


def test_a_write_in_a_pass_that_is_given_up_is_warned_of(caplog):
    model = Writing(clamp)
    optimizer = wrap(model)
    model(inputs()[0])
    optimizer.disarm()
    assert "net.0.weight" in caplog.text


def test_parametrizations_take_the_place_of_writes():
    class Clamped(nn.Module):
        def forward(self, weight):
            return weight.clamp(-0.1, 0.1)

    model = network()
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Clamped())
    optimizer = wrap(model)
    train(model, optimizer, steps=3)
    assert optimizer.report()["slots"]["perturbed"] == 3


# Two wrappers.


def test_a_wrapper_on_a_part_of_a_wrapped_model_is_refused():
    model = network()
    whole = wrap(model)
    with pytest.raises(ValueError, match=r"weight belongs to the model of another RWP.*remove\(\)"):
        wrap(model[0])
    whole.remove()
    part = wrap(model[0])
    with pytest.raises(ValueError, match="another RWP"):
        wrap(model)
    del part, whole
    gc.collect()
    train(model, wrap(model))


class Coder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(3, 2).double()

    def forward(self, x):
        return self.head(self.encoder(x))


def test_two_models_that_share_an_encoder_are_refused_also_where_they_come_to_share_it_later():
    encoder = network()
    first = wrap(Coder(encoder))
    with pytest.raises(ValueError, match=r"encoder\.0\.weight"):
        wrap(Coder(encoder))
    other = Coder(network(1))
    second = wrap(other)
    other.encoder[0] = encoder[0]
    clean = snapshot(other)
    with pytest.raises(ValueError, match=r"encoder\.0\.weight"):
        other(inputs()[0])
    assert same(snapshot(other), clean)
    del first
    gc.collect()
    second.remove()


def test_two_disjoint_models_stay_right_with_crossed_passes():
    models = [network(0), network(1)]
    wrappers = [wrap(model) for model in models]
    clean = [snapshot(model) for model in models]
    x = inputs()[0]
    losses = [model(x).square().sum() for model in models]
    for loss in reversed(losses):
        loss.backward()
    assert all(map(same, map(snapshot, models), clean))
    for optimizer in wrappers:
        optimizer.step()
        assert optimizer.report()["slots"] == {"clean": 0, "perturbed": 1}


def test_two_optimizers_over_one_model_perturb_all_of_it_as_documented():
    model = network()
    matrices = torch.optim.SGD(model[0].parameters(), lr=0.1)
    rest = torch.optim.AdamW(model[1:].parameters(), lr=0.01)
    matrices.add_param_group({"params": list(model[1:].parameters()), "lr": 0.0})
    optimizer = wrap(model, matrices)
    before = snapshot(model)
    with seen_weights(model) as seen:
        model(inputs()[0]).square().sum().backward()
    (eps,) = noises(seen, before)
    assert all(noise.any() for noise in eps.values())
    optimizer.step()
    assert torch.equal(model[3].weight, before["3.weight"])
    rest.step()
    assert not torch.equal(model[3].weight, before["3.weight"])
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_new_wrapper_on_a_model_draws_other_noise_and_a_run_repeats_itself():
    def rounds(model):
        drawn = []
        for _ in range(3):
            clean = snapshot(model)
            optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.0))
            with seen_weights(model) as seen:
                train(model, optimizer, steps=2)
            drawn += noises(seen, clean)
            assert optimizer.report()["windows"] == 2
        return drawn

    drawn = rounds(network())
    for number, eps in enumerate(drawn):
        assert all(not torch.equal(eps["0.weight"], other["0.weight"]) for other in drawn[:number])
    assert all(map(same, drawn, rounds(network())))


def test_a_window_without_a_gradient_does_not_count():
    model = network()
    optimizer = wrap(model)
    for give_up in (optimizer.disarm, lambda: optimizer.begin_window(1), optimizer.step):
        optimizer.train()
        model(inputs()[0])
        give_up()
        assert optimizer.state_dict()["rwp"]["windows"] == 0


def test_a_wrapper_that_only_a_cycle_holds_is_no_overlap():
    encoder = network()
    gc.disable()
    try:
        held = wrap(Coder(encoder))
        held.itself = held
        del held
        other = Coder(encoder)
        train(other, wrap(other))
    finally:
        gc.enable()


def test_zeroing_inside_the_backward_pass_does_not_end_the_window(caplog):
    model = network()
    optimizer = wrap(model, alpha=0.5, accumulation_steps=2)
    roles = []
    for x in inputs(4):
        output = model(x)
        roles.append(optimizer.role.perturbed)
        output.register_hook(lambda _: optimizer.zero_grad() if len(roles) % 2 else None)  # ahead of all gradients
        output.square().sum().backward()
        if len(roles) % 2 == 0:
            optimizer.step()
    assert roles == [False, True] * 2
    assert not caplog.records


def test_a_retired_wrapper_leaves_no_hooks_on_its_base(caplog):
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)

    def hooks():
        names = ("step_post", "load_state_dict_pre", "load_state_dict_post")
        return [len(getattr(base, f"_optimizer_{name}_hooks")) for name in names]

    saved = wrap(network(), gamma=0.7).state_dict()
    wrappers = [wrap(model, base) for _ in range(3)]
    assert hooks() == [1, 1, 1]
    base.load_state_dict(saved)
    assert caplog.text.count("takes the place of") == 1
    wrappers[-1].remove()
    assert hooks() == [0, 0, 0]


# Copies between a forward and its backward pass.


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": reloaded,
    "deepcopy of the parts": lambda model: nn.Sequential(*map(copy.deepcopy, model)),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("root", [False, True], ids=["in layers", "of the root's own"])
def test_a_copy_between_forward_and_backward_is_clean_and_the_gradient_is_right(make, root):
    def gradients(between):
        model = network()
        model = nn.Sequential(nn.Linear(6, 3).double()) if root else model
        if root:
            torch.manual_seed(0)
            nn.init.normal_(model[0].weight)
            nn.init.normal_(model[0].bias)
        optimizer = wrap(model)
        clean = {**snapshot(model), **{name: buffer.clone() for name, buffer in model.named_buffers()}}
        loss = model(inputs()[0]).square().sum()
        twin = between(model)
        loss.backward()
        optimizer.step()
        return twin, clean, {name: p.grad for name, p in model.named_parameters()}

    twin, clean, found = gradients(make)
    assert all(torch.equal(p, clean[name]) for name, p in twin.named_parameters())
    assert same(found, gradients(lambda _: None)[2])
    assert not any("__deepcopy__" in vars(p) or "__reduce_ex__" in vars(p) for p in twin.parameters())
    again = copy.deepcopy(twin)
    assert all(map(torch.equal, again.parameters(), twin.parameters()))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))
        self.net = network()

    def forward(self, x):
        self.seen = self.seen + x.mean()
        return self.net(x)


@pytest.mark.parametrize("make", [copy.deepcopy, reloaded], ids=["deepcopy", "torch.save"])
def test_a_copy_between_the_passes_has_the_buffers_from_before_them(make):
    """Also one that the forward pass replaced by another tensor, and that comes ahead of all weights."""

    model = Counting()
    optimizer = wrap(model, alpha=0.5, accumulation_steps=2)
    clean, perturbed = inputs(2)
    model(clean).sum().backward()
    after_clean = model.seen.clone()
    loss = model(perturbed).sum()
    assert optimizer.role.perturbed
    twin = make(model)
    assert torch.equal(twin.seen, after_clean)
    assert not vars(twin.seen)
    loss.backward()
    assert torch.equal(model.seen, after_clean)
    assert not vars(model.seen)


def test_a_copy_inside_the_forward_pass_has_the_weights_of_that_pass():
    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            copies.append((copy.deepcopy(self.net[0].weight), self.net[0].weight.detach().clone()))
            return self.net(x)

    copies = []
    model = Copying()
    optimizer = wrap(model)
    clean = snapshot(model)
    model(inputs()[0]).sum().backward()
    ((copied, seen),) = copies
    assert torch.equal(copied, seen)
    assert not torch.equal(seen, clean["net.0.weight"])
    optimizer.step()


# Parameters that are others by now.


def test_functional_call_and_replaced_parameters_are_named_with_what_helps():
    model = network()
    optimizer = wrap(model)
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"functional_call.*call the model itself"):
        torch.func.functional_call(model, others, (inputs()[0],))
    model.load_state_dict(network(1).state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"nothing to perturb: 6 of.*without assign"):
        model(inputs()[0])
    optimizer.remove()
    model = network()
    optimizer = wrap(model)
    for layer in (model[0], model[1], model[3]):
        layer.weight, layer.bias = nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())
    with pytest.raises(RuntimeError, match="build the optimizer and RWP after"):
        model(inputs()[0])


def test_gamma_is_found_by_name_where_a_framework_swaps_the_groups_parameters():
    model = network()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[3].parameters()), "rwp_gamma": 0.0}]
    optimizer = wrap(model, torch.optim.SGD(groups, lr=0.0))
    for group in optimizer.param_groups:  # as DeepSpeed's ZeRO puts flat partitions there
        group["params"] = [torch.cat([p.detach().flatten() for p in group["params"]])]
    clean = snapshot(model)
    with seen_weights(model) as seen:
        model(inputs()[0]).sum().backward()
    (eps,) = noises(seen, clean)
    assert eps["0.weight"].any()
    assert not eps["3.weight"].any()


def test_parameters_swapped_in_the_model_and_in_the_groups_are_perturbed():
    model = network()
    optimizer = wrap(model)
    twins = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for module in model:
        for name, p in list(module._parameters.items()):
            module._parameters[name] = twins[p]
    for group in optimizer.param_groups:
        group["params"] = [twins[p] for p in group["params"]]
    clean = snapshot(model)
    with seen_weights(model) as seen:
        train(model, optimizer)
    assert all(noise.any() for noise in noises(seen, clean)[0].values())


# Hooks, outputs and calls of an unusual kind.


@pytest.mark.parametrize("put_on", ["weight_norm", "spectral_norm", "prune"])
def test_a_pre_hook_on_the_root_that_makes_its_weight_sees_the_noise(put_on):
    model = nn.Linear(6, 3).double()
    if put_on == "weight_norm":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model)
    elif put_on == "spectral_norm":
        nn.utils.spectral_norm(model)
    else:
        prune.l1_unstructured(model, "weight", 0.3)
    x = inputs()[0]
    model(x)
    optimizer = wrap(model)
    made = []
    model.register_forward_pre_hook(lambda module, _: made.append(module.weight.detach().clone()))
    model.eval()(x)
    model.train()(x)
    assert not torch.allclose(made[0], made[1], rtol=1e-3)
    assert optimizer.role.perturbed


def test_a_later_pass_without_a_differentiable_output_leaves_the_micro_step_open():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.labels = network(), False

        def forward(self, x):
            logits = self.net(x)
            return logits.argmax(1) if self.labels else logits

    model, (x,) = Classifier(), inputs()
    optimizer = wrap(model)
    clean = snapshot(model)
    loss = model(x).square().sum()
    model.labels = True
    model(x)
    model.labels = False
    loss.backward()
    assert same(snapshot(model), clean)
    optimizer.step()
    assert optimizer.report()["slots"]["perturbed"] == 1


def test_an_error_in_a_later_pass_leaves_clean_weights_and_the_first_pass_its_gradient():
    def gradients(fails):
        model, (x,) = network(), inputs()
        optimizer = wrap(model)
        clean = snapshot(model)
        loss = model(x).square().sum()
        if fails:
            with pytest.raises(RuntimeError):
                model(x[:, :2])
            assert same(snapshot(model), clean)
        loss.backward()
        optimizer.step()
        return {name: p.grad for name, p in model.named_parameters()}

    assert same(gradients(True), gradients(False))


@pytest.mark.parametrize("inner", ["with gradients", "no_grad", "detached"])
def test_a_model_that_calls_itself_is_one_micro_step(inner):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, again=True):
            output = self.net(x)
            if not again:
                return output.detach() if inner == "detached" else output
            with torch.set_grad_enabled(inner != "no_grad"):
                teacher = self(x, again=False)
            return output + teacher

    model, (x,) = Twice(), inputs()
    optimizer = wrap(model)
    clean = snapshot(model)
    for _ in range(2):
        model(x).square().sum().backward()
        assert same(snapshot(model), clean)
        optimizer.step()
        optimizer.zero_grad()
        clean = snapshot(model)
    assert optimizer.report()["slots"]["perturbed"] == 2


def test_a_forward_pass_inside_backward_names_cached_losses_and_checkpointing():
    model, (x,) = network(), inputs()
    optimizer = wrap(model)
    with torch.no_grad():
        embedded = model(x)
    embedded.requires_grad_()
    loss = embedded.square().sum()

    def forward_again(_):
        with torch.enable_grad():
            model(x).backward(torch.ones(5, 3))

    loss.register_hook(forward_again)
    with pytest.raises(RuntimeError, match=r"GradCache.*plain loss"):
        loss.backward()
    with pytest.raises(RuntimeError, match="Checkpoint its layers"):
        checkpoint(model, x, use_reentrant=False).sum().backward()
    optimizer.remove()


# Buffers.


class Lazy(nn.Module):
    """A range observer of quantization-aware training: lays its buffers out in its first pass, in place."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.register_buffer("low", torch.empty(0, dtype=torch.float64))
        self.register_buffer("replaced", torch.empty(0, dtype=torch.float64))

    def forward(self, x):
        output = self.net(x)
        with torch.no_grad():
            if not self.low.numel():
                self.low.resize_(3).fill_(1e9)
                self.replaced = torch.zeros(3, dtype=torch.float64)
            self.low.copy_(torch.minimum(self.low, output.amin(0)))
        return output


def test_a_buffer_that_a_perturbed_pass_lays_out_stays_and_training_goes_on():
    model = Lazy()
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model, gamma=0.3, alpha=0.5, accumulation_steps=2)
    model.low.resize_(0)
    first, second = inputs(2)
    model(first).sum().backward()
    model.low.resize_(0)  # as if the perturbed pass were this buffer's first
    model.replaced = torch.empty(0, dtype=torch.float64)
    clean = snapshot(model)
    model(second).sum().backward()
    assert same(snapshot(model), clean)
    assert model.low.shape == model.replaced.shape == (3,)
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, steps=1)
    for use in (model.state_dict, optimizer.eval, optimizer.train, optimizer.disarm, optimizer.remove):
        use()


def test_no_failure_in_restoring_leaves_a_wrapper_that_cannot_be_got_rid_of():
    model, (x,) = network(), inputs()
    optimizer = wrap(model)
    model(x)
    model[3].weight.data = torch.zeros(2, 2, dtype=torch.float64)
    clean = network()
    with pytest.raises(RuntimeError, match=r"noise is left in 1 .*\(3, 8\) has shape \(2, 2\)"):
        optimizer.disarm()
    assert torch.equal(model[0].weight, clean[0].weight)
    for use in (optimizer.eval, optimizer.train, optimizer.zero_grad, optimizer.disarm, optimizer.remove):
        use()


# What is said.


def test_noise_larger_than_the_weights_is_warned_of_once_with_what_is_usual(caplog):
    model = network()
    optimizer = wrap(model, gamma=10.0, noise="filter_normalized")
    train(model, optimizer, steps=3)
    assert caplog.text.count("times as large as its weights") == 1
    assert "0.2 in filter_normalized" in caplog.text


@pytest.mark.parametrize(("dtype", "said"), [(torch.bfloat16, 1), (torch.float32, 0)])
def test_noise_that_bfloat16_rounds_away_is_warned_of(dtype, said, caplog):
    torch.manual_seed(0)
    model = nn.Linear(64, 32).to(dtype)
    optimizer = wrap(model, gamma=0.001, noise="filter_normalized")
    model(torch.ones(2, 64, dtype=dtype)).sum().backward()
    optimizer.step()
    assert caplog.text.count("mostly the rounding") == said


def test_usual_noise_is_not_warned_of(caplog):
    model = network()
    train(model, RWP(torch.optim.SGD(model.parameters(), lr=0.1), model, alpha=1.0), steps=2)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_loop_that_steps_after_its_first_gradient_is_told_what_was_seen(caplog):
    model = network()
    optimizer = wrap(model, alpha=0.5, accumulation_steps=3)
    for step, x in enumerate(inputs(7)):
        (model(x).square().sum() / 3).backward()
        if step % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert "a step after 1 gradients where 3 were due" in caplog.text
    assert "(step + 1) % K == 0" in caplog.text
    assert "number of batches" not in caplog.text


def test_another_gamma_or_seed_than_the_checkpoints_is_said_once(caplog):
    saved = wrap(network(), gamma=0.3, seed=1).state_dict()
    model = network()
    optimizer = wrap(model, gamma=0.1, seed=2)
    optimizer.load_state_dict(saved)
    assert "rwp_gamma, [0.3], takes the place of [0.1]" in caplog.text
    assert "rwp_seed, 1, takes the place of 2" in caplog.text
    caplog.clear()
    optimizer.load_state_dict(saved)
    assert not caplog.records


# Antithetic noise.


@pytest.mark.parametrize(("alpha", "micro_steps", "pairs", "alone"), [(0.5, 4, 1, 0), (0.5, 6, 1, 1), (1.0, 5, 2, 1)])
def test_antithetic_slots_of_a_step_are_opposite_in_pairs(alpha, micro_steps, pairs, alone):
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = wrap(model, base, alpha=alpha, accumulation_steps=micro_steps, antithetic=True)
    clean = snapshot(model)
    for _ in range(2):
        with seen_weights(model) as seen:
            for x in inputs(micro_steps):
                (model(x).square().sum() / micro_steps).backward()
        optimizer.step()
        eps = [noise for noise in noises(seen, clean) if noise]
        assert len(eps) == 2 * pairs + alone
        for first, second in zip(eps[: 2 * pairs : 2], eps[1 : 2 * pairs : 2], strict=True):
            for name in clean:
                torch.testing.assert_close(first[name], -second[name], rtol=1e-9, atol=1e-15)
        assert not any(torch.equal(eps[0]["0.weight"].abs(), other["0.weight"].abs()) for other in eps[2:])


def test_an_antithetic_pair_takes_the_first_order_of_the_noise_out_of_the_gradient():
    model = nn.Linear(6, 1, bias=False).double()
    x = inputs()[0]
    exact = torch.autograd.grad(model(x).square().mean(), model.weight)[0]  # linear in the weights: no second order
    found = {}
    for antithetic in (False, True):
        optimizer = wrap(model, accumulation_steps=2, antithetic=antithetic)
        for _ in range(2):
            (model(x).square().mean() / 2).backward()
        found[antithetic] = model.weight.grad.clone()
        optimizer.zero_grad()
        optimizer.remove()
    torch.testing.assert_close(found[True], exact, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found[False], exact, rtol=1e-3)


def test_large_complex_weights_get_noise_in_both_parts():
    torch.manual_seed(0)
    for shape in ((3,), (5, 7), (4, 20_000)):
        weight = nn.Parameter(torch.randn(shape, dtype=torch.complex64))
        model = nn.Module()
        model.weight = weight
        model.forward = lambda x, weight=weight: (weight * x).abs().square().sum()
        optimizer = wrap(model, gamma=0.1, noise="filter_normalized")
        clean = weight.detach().clone()
        loss = model(torch.ones(()))
        eps = weight.detach() - clean
        assert eps.real.any()
        assert eps.imag.any()
        if weight.numel() > 1000:
            assert (eps.real.norm() / eps.imag.norm()).item() == pytest.approx(1, rel=0.05)
            assert (eps.norm() / clean.norm()).item() == pytest.approx(0.1, rel=0.05)
        loss.backward()
        assert torch.equal(weight.detach(), clean)
        optimizer.remove()
