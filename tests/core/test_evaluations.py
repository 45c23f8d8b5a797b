"""Forward passes in eval mode that have a backward pass: it finds the clean weights that they saw, or raises."""

import pytest
import torch
import torch.nn.functional as F
from reference import noises, seen_weights, snapshot
from test_closures import inputs, labels, network

from hf_rwp import RWP


def wrap(model, alpha=1.0, **options):
    steps = 2 if alpha < 1 else None
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return RWP(base, model, gamma=0.2, alpha=alpha, accumulation_steps=steps, **options)


def evaluated(model, x):
    output = model.eval()(x)
    model.train()
    return output


def gradient(weights, loss):
    """Of `loss`, a function of a call, at `weights`, by name."""
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    value = loss(lambda x: torch.func.functional_call(network(), leaves, (x,)))
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def moved(clean, noise):
    return {name: weight + noise[name] for name, weight in clean.items()}


def assert_gradient(model, *parts):
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, sum(part[name] for part in parts), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_part_of_the_loss_that_comes_after_the_training_pass_has_its_gradient_at_clean_weights(frozen):
    model = network()
    first, second = inputs(2)
    optimizer = wrap(model, frozen=frozen)
    clean = snapshot(model)
    for _ in range(2):
        with seen_weights(model) as seen:
            loss = F.cross_entropy(model(first), labels(first))
            loss = loss + (evaluated(model, second) ** 2).sum() + evaluated(model, first).sum()
        loss.backward()
        trained = gradient(
            moved(clean, noises(seen, clean)[0]), lambda call: F.cross_entropy(call(first), labels(first))
        )
        looked = gradient(clean, lambda call: (call(second) ** 2).sum() + call(first).sum())
        assert_gradient(model, trained, looked)
        assert all(torch.equal(p, clean[name]) for name, p in model.named_parameters())
        optimizer.zero_grad()


def test_one_that_came_ahead_of_it_raises_and_leaves_clean_weights():
    model = network()
    first, second = inputs(2)
    optimizer = wrap(model)
    clean = snapshot(model)
    loss = (evaluated(model, second) ** 2).sum() + F.cross_entropy(model(first), labels(first))
    with pytest.raises(
        RuntimeError, match="in eval mode, at clean weights, is in the loss of a perturbed training pass"
    ):
        loss.backward()
    optimizer.zero_grad()
    assert all(torch.equal(p, clean[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("ahead", [False, True])
def test_beside_a_clean_training_pass_both_are_right(ahead):
    model = network()
    first, second = inputs(2)
    wrap(model, alpha=0.5)
    parts = [lambda: evaluated(model, second).sum(), lambda: F.cross_entropy(model(first), labels(first))]
    loss = sum(part() for part in (parts if ahead else parts[::-1]))
    loss.backward()
    clean = snapshot(model)
    assert_gradient(
        model, gradient(clean, lambda call: call(second).sum() + F.cross_entropy(call(first), labels(first)))
    )


def test_a_backward_pass_of_its_own_between_the_two_of_a_training_step_finds_clean_weights():
    """An attack's, on the images of the next step."""
    model = network()
    first, second = inputs(2)
    optimizer = wrap(model)
    clean = snapshot(model)
    with seen_weights(model) as seen:
        loss = F.cross_entropy(model(first), labels(first))
        attacked = second.clone().requires_grad_()
        (found,) = torch.autograd.grad(evaluated(model, attacked).logsumexp(1).sum(), attacked)
    expected = second.clone().requires_grad_()
    torch.func.functional_call(network(), clean, (expected,)).logsumexp(1).sum().backward()
    torch.testing.assert_close(found, expected.grad)
    loss.backward()
    trained = gradient(moved(clean, noises(seen, clean)[0]), lambda call: F.cross_entropy(call(first), labels(first)))
    assert_gradient(model, trained)
    optimizer.step()
