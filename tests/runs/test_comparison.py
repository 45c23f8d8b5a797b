"""The records of methods side by side: tables, and the settings that a search found best."""

import itertools
import random
from fractions import Fraction

import pytest

from hf_rwp.runs import comparison


def test_the_table_is_what_the_records_say():
    runs = [("base", 0, 0.5), ("base", 1, 0.6), ("rwp", 0, 0.55), ("rwp", 1, 0.63)]
    settings = {"lr": 0.1, "weight_decay": 5e-4, "strength": 0.01}
    records = [
        {"method": m, "seed": s, "top1": t, "gradients": 2.0, "seconds": 10.0, "settings": settings}
        | {"history": [{"train_loss": 0.1}]}
        for m, s, t in runs
    ]
    *_, plain, rwp = comparison.comparison_table(records).splitlines()
    assert plain == "| plain | 55.00 ± 7.07 |  | 2 | 2 | 10 s | 0.1, 0.0005, 0.01 |"
    assert rwp == "| RWP | 59.00 ± 5.66 | +4.00 ± 1.41 | 2 | 2 | 10 s | 0.1, 0.0005, 0.01 |"


def test_the_best_settings_are_of_the_protocols_own_search_first():
    """Else of the one under equal images, which serves all protocols."""
    trials = [("images", 0.1, 0.5), ("images", 0.2, 0.6), ("gradients", 0.3, 0.4)]
    common = {"kind": "trial", "method": "base"}
    records = [common | {"protocol": p, "settings": {"lr": lr}, "top1": top1} for p, lr, top1 in trials]
    best = {
        protocol: comparison.best_settings(records, "base", protocol) for protocol in ("images", "gradients", "time")
    }
    assert best == {"images": {"lr": 0.2}, "gradients": {"lr": 0.3}, "time": {"lr": 0.2}}
    assert comparison.best_settings(records, "rwp", "images") is None


def by_counting(differences):
    """The share of all signs that are as far from 0, in exact numbers."""
    exact = [Fraction(value) for value in differences]
    sums = [
        abs(sum(sign * size for sign, size in zip(signs, exact, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(exact))
    ]
    return sum(total >= abs(sum(exact)) for total in sums) / len(sums)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_exact_test_is_what_counting_all_signs_gives(count):
    generator = random.Random(count)
    for _ in range(20):
        differences = [generator.randint(-8, 12) / 8 for _ in range(count)]  # exact in binary, with ties and zeros
        assert comparison.sign_flip_p(differences) == by_counting(differences)


def test_the_exact_test_has_the_p_that_is_known():
    assert comparison.sign_flip_p([1.0, 2.0, 3.0, 0.5, 0.25, 4.0, 1.5, 2.5]) == 2 / 256
    assert comparison.sign_flip_p([-0.1] * 5) == 2 / 32
    assert comparison.sign_flip_p([0.1, 0.2, -0.3]) == 1.0  # 0 but for rounding
    assert comparison.sign_flip_p([0.0, 0.0]) == 1.0
    for pairs in (0, 21):
        with pytest.raises(ValueError, match=f"1 to 20 pairs, got {pairs}"):
            comparison.sign_flip_p([1.0] * pairs)


def test_holm_raises_each_p_by_how_many_are_left():
    assert comparison.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert comparison.holm([0.5, 0.9]) == [1.0, 1.0]
    assert comparison.holm([0.02]) == [0.02]
    assert comparison.holm([]) == []


def test_gains_are_paired_by_seed():
    ours = [{"seed": 2, "top1": 0.9}, {"seed": 1, "top1": 0.5}, {"seed": 7, "top1": 0.1}]
    theirs = [{"seed": 1, "top1": 0.25}, {"seed": 2, "top1": 0.5}]
    assert comparison.paired_gains(ours, theirs, lambda run: run["top1"]) == pytest.approx([0.4, 0.25])
