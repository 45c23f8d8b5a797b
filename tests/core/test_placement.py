"""Guarantee 2 of hf_rwp/README.md, the pure part: the weights of slots turn the framework's mean into the paper's mix.

All replicas 1 to 9, micro-steps 1 to 5 and alpha .2 .5 .8 1, counted out in exact fractions.
"""

import itertools
from fractions import Fraction

import pytest

from hf_rwp.core.placement import Role, antithetic, fewest_micro_steps, mixes, role, role_shares

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


@every_window
def test_slots_that_weigh_by_their_tokens_make_the_mix_of_the_means_over_tokens(replicas, micro_steps, alpha):
    if alpha == 1:
        return  # one role: the framework's own mean is right
    places = list(itertools.product(range(replicas), range(micro_steps)))
    tokens = {place: 1 + (7 * place[0] + 3 * place[1]) % 5 for place in places}
    of_index = [0] * (replicas if replicas > 1 else micro_steps)
    for place, count in tokens.items():
        of_index[place[0] if replicas > 1 else place[1]] += count
    roles = {place: role(*place, replicas, micro_steps, alpha, role_shares(of_index)) for place in places}
    for perturbed, share in ((True, alpha), (False, 1 - alpha)):
        mine = [place for place in places if roles[place].perturbed == perturbed]
        for place in mine:  # the framework's factor on a slot's mean, times its weight
            factor = tokens[place] / sum(tokens.values()) * roles[place].weight
            assert factor == pytest.approx(share * tokens[place] / sum(tokens[slot] for slot in mine), rel=1e-14)


@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_equal_tokens_weigh_as_no_tokens(alpha):
    for index in range(3):
        assert role(0, index, 1, 3, alpha, role_shares([4, 4, 4])).weight == pytest.approx(
            role(0, index, 1, 3, alpha).weight, rel=1e-15
        )


@pytest.mark.parametrize("items", [[5, 0], [0, 5], [0, 0]])
def test_a_role_without_tokens_leaves_the_step_to_the_other(items):
    assert [role(0, index, 1, 2, 0.3, role_shares(items)) for index in (0, 1)] == [Role(False, 1.0), Role(True, 1.0)]


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
def test_one_slot_alone_has_nothing_to_mix(alpha):
    with pytest.raises(ValueError, match=f"alpha={alpha} mixes .* only one, on one replica"):
        role(0, 0, 1, 1, alpha)
    assert role(0, 0, 1, 1, 1.0) == Role(perturbed=True, weight=1.0)


def test_a_role_is_a_value():
    with pytest.raises(AttributeError):
        role(0, 0, 2, 1, 0.5).weight = 2.0


@pytest.mark.parametrize(
    ("alpha", "pairs", "expected"),
    [
        (0.5, False, [2, 1, 1, 1, 1]),
        (0.5, True, [4, 2, 2, 1, 1]),
        (1.0, False, [1, 1, 1, 1, 1]),
        (1.0, True, [2, 1, 1, 1, 1]),
        (0.0, True, [1, 1, 1, 1, 1]),
    ],
)
def test_a_step_has_the_gradients_that_its_mix_and_its_pairs_need(alpha, pairs, expected):
    """Of 1 to 5 replicas, of which the odd ones are perturbed: with pairs at least two such gradients in all."""
    assert [fewest_micro_steps(replicas, alpha, pairs) for replicas in range(1, 6)] == expected


@pytest.mark.parametrize("alpha", [0.2, 0.8])
@pytest.mark.parametrize("replicas", range(1, 10))
def test_the_fewest_micro_steps_are_enough_and_no_more_than_that(alpha, replicas):
    fewest = fewest_micro_steps(replicas, alpha)
    assert {slot.perturbed for slot in slots(replicas, fewest, alpha).values()} == {False, True}
    paired = fewest_micro_steps(replicas, alpha, antithetic=True)
    places = [place for place, slot in slots(replicas, paired, alpha).items() if slot.perturbed]
    assert {antithetic(*place, replicas, paired, alpha)[2] for place in places} == {1, -1}


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 8), (2, 3), (3, 2), (4, 1), (5, 2)])
def test_of_an_antithetic_pair_the_first_has_its_own_noise_and_the_second_the_opposite_of_it(
    alpha, replicas, micro_steps
):
    places = [place for place, slot in slots(replicas, micro_steps, alpha).items() if slot.perturbed]
    drawn = [antithetic(*place, replicas, micro_steps, alpha) for place in places]
    firsts = places[0::2]
    assert drawn[0::2] == [(*place, 1) for place in firsts]
    assert drawn[1::2] == [(*place, -1) for place in firsts[: len(places) // 2]]


@pytest.mark.parametrize(
    ("alpha", "gamma", "expected"),
    [(0.5, None, True), (0.5, 0.1, True), (0.5, 0.0, False), (0.0, None, False), (1.0, None, False)],
)
def test_a_step_mixes_where_both_gradients_count(alpha, gamma, expected):
    assert mixes(alpha, gamma) is expected
