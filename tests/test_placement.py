"""Guarantee 2 of design.md, the pure part: the weights of the slots turn the framework's mean into the paper's mix.

All replicas 1 to 9, micro-steps 1 to 5 and alpha .2 .5 .8 1, counted out in exact fractions.
"""

import itertools
from fractions import Fraction

import pytest

from hf_rwp.placement import Role, role

ALPHAS = [0.2, 0.5, 0.8, 1.0]
WINDOWS = [
    (replicas, micro_steps, alpha)
    for replicas, micro_steps, alpha in itertools.product(range(1, 10), range(1, 6), ALPHAS)
    if replicas * micro_steps > 1 or alpha == 1
]
every_window = pytest.mark.parametrize(("replicas", "micro_steps", "alpha"), WINDOWS)


def slots(replicas: int, micro_steps: int, alpha: float) -> dict[tuple[int, int], Role]:
    places = itertools.product(range(replicas), range(micro_steps))
    return {place: role(*place, replicas, micro_steps, alpha) for place in places}


@every_window
def test_weights_sum_to_the_number_of_slots(replicas, micro_steps, alpha):
    total = sum(Fraction(slot.weight) for slot in slots(replicas, micro_steps, alpha).values())
    assert total == pytest.approx(replicas * micro_steps, rel=1e-15)


@every_window
def test_perturbed_share_is_alpha_and_each_role_weighs_the_same(replicas, micro_steps, alpha):
    roles = slots(replicas, micro_steps, alpha).values()
    perturbed = [Fraction(slot.weight) for slot in roles if slot.perturbed]
    clean = [Fraction(slot.weight) for slot in roles if not slot.perturbed]
    assert sum(perturbed) / len(roles) == pytest.approx(alpha, rel=1e-15)
    assert sum(clean) / len(roles) == pytest.approx(1 - alpha, rel=1e-15)
    assert len(set(perturbed)) == 1
    assert len(set(clean)) == (alpha < 1)


@every_window
def test_parallel_replicas_alternate_and_sequential_micro_steps_alternate_clean_first(replicas, micro_steps, alpha):
    for (replica, micro_step), slot in slots(replicas, micro_steps, alpha).items():
        index = replica if replicas > 1 else micro_step
        assert slot.perturbed == (alpha == 1 or index in (1, 3, 5, 7))
        if replica == 0 and replicas > 1:
            assert slot.perturbed == (alpha == 1)


@pytest.mark.parametrize("replicas", [2, 4, 6, 8])
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_an_even_world_at_alpha_one_half_weighs_nothing(replicas, micro_steps):
    assert {slot.weight for slot in slots(replicas, micro_steps, 0.5).values()} == {1.0}


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
def test_one_slot_alone_has_nothing_to_mix(alpha):
    with pytest.raises(ValueError, match=f"one gradient on one replica.*alpha={alpha}"):
        role(0, 0, 1, 1, alpha)
    assert role(0, 0, 1, 1, 1.0) == Role(perturbed=True, weight=1.0)


def test_a_role_is_a_value():
    with pytest.raises(AttributeError):
        role(0, 0, 2, 1, 0.5).weight = 2.0
