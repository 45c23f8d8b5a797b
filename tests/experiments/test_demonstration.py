"""The words of a demonstration say what its figures do, whichever way they go."""

import pytest

from hf_rwp.experiments.demonstration import (
    CAVEAT,
    ONE_SEED,
    best_of_search,
    errors,
    loss_rise,
    pairs_table,
    search_table,
    table,
    title,
    words,
)


def runs(wrong, gradients=30.0, seconds=10.0, rise=0.5):
    """One for each count of wrong images out of 100; rise: of the loss at a quarter of a norm."""
    coordinates = [-0.5, -0.25, 0.0, 0.25, 0.5]
    return [
        {
            "seed": seed,
            "task": {"label_noise": 0.4, "epochs": 30},
            "top1": 1 - count / 100,
            "images": {"evaluated": 100},
            "gradients": gradients,
            "seconds": seconds,
            "landscape": {"coordinates": coordinates, "losses": [9.0, 1 + rise - 0.1, 1.0, 1 + rise + 0.1, 9.0]},
        }
        for seed, count in enumerate(wrong)
    ]


def said(rwp, base, sam=None):
    text = " ".join(words({"base": base, **({"sam": sam} if sam else {}), "rwp": rwp}))
    assert text.endswith(CAVEAT)
    return text


def test_a_seed_that_rwp_wins():
    text = said(runs([4], seconds=14.0, rise=0.2), runs([8]), runs([3], 60.0, 20.0, 0.1))
    assert text.startswith(
        "RWP made 4 errors on 100 held-out images; plain training made 8, so that RWP made 4 fewer (50 %). "
        "RWP took as many gradients and 1.4 times the time. "
        "SAM made 3, so that RWP made 1 more (33 %). RWP took half the gradients and 0.7 times the time. "
        "A step of 0.25 norms of a filter in a random direction raises the training loss by 0.2 from RWP's weights, "
        "0.5 from plain training's, 0.1 from SAM's: RWP's place is flatter than plain training's and steeper than "
        "SAM's."
    )
    assert ONE_SEED in text
    assert "chance" not in text


def test_a_seed_that_rwp_loses_and_one_without_a_difference():
    text = said(runs([9], rise=0.7), runs([6]))
    assert "plain training made 6, so that RWP made 3 more (50 %)." in text
    assert "RWP took as many gradients and about the same time." in text
    assert "RWP's place is steeper than plain training's." in text
    assert "SAM" not in text
    text = said(runs([6]), runs([6]))
    assert "RWP made 6 errors on 100 held-out images; plain training made as many." in text
    assert "RWP's place is as flat as plain training's." in text
    assert "plain training made 0, so that RWP made 2 more. " in said(runs([2]), runs([0]))


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([4, 5, 6, 4, 5, 6], "Fewer with RWP on 6 seeds, more on 0, which is more than chance (p = 0.031, exact"),
        ([9, 7, 8, 9, 7, 8], "Fewer with RWP on 1 seed, more on 4, which is no more than chance (p = 0.38, exact"),
        ([16, 15, 16, 14, 15, 16], "Fewer with RWP on 0 seeds, more on 6, which is more than chance (p = 0.031, exact"),
    ],
)
def test_over_seeds_the_words_tell_luck_from_method(ours, verdict):
    text = said(runs(ours), runs([8, 7, 7, 8, 8, 7]))
    assert verdict in text
    assert f"RWP made {sum(ours) / 6:.1f} errors on 100 held-out images, on average over 6 seeds" in text
    assert ONE_SEED not in text


def test_a_few_seeds_are_called_too_few():
    assert "Fewer with RWP on 3 seeds, more on 0: too few seeds to tell" in said(runs([1, 1, 1]), runs([9, 9, 9]))


def test_seeds_are_paired_by_their_number():
    ours, theirs = runs([1, 2, 3, 4, 5, 6]), runs([2, 3, 4, 5, 6, 7])
    assert "Fewer with RWP on 6 seeds, more on 0," in said(ours, theirs[::-1])


def test_a_loss_that_is_no_number_is_told():
    broken = runs([4])
    broken[0]["landscape"]["losses"][1] = None
    assert "the training loss is not a finite number" in said(broken, runs([8]))
    assert table({"base": runs([8]), "rwp": broken})[2].split()[-1] == "nan"


def test_the_table_has_a_row_for_each_method():
    found = {"base": runs([8, 9]), "sam": runs([3, 5], 60.0, 20.0), "rwp": runs([4, 5], seconds=14.0, rise=0.2)}
    assert table(found) == [
        "          top-1 (%)  errors  gradients  seconds  loss rise nearby",
        "plain  91.50 ± 0.71     8.5         30       10               0.5",
        "SAM    96.00 ± 1.41     4.0         60       20               0.5",
        "RWP    95.50 ± 0.71     4.5         30       14               0.2",
    ]
    assert errors(found["sam"]) == [3, 5]
    assert loss_rise(found["rwp"]) == pytest.approx(0.2)


def test_pairs_have_their_difference_and_p():
    found = {"base": runs([8, 9, 8, 9, 8, 9]), "sam": runs([3, 3, 3, 3, 3, 10]), "rwp": runs([4, 4, 4, 4, 4, 4])}
    assert pairs_table(found).splitlines()[2:] == [
        "| RWP over plain | +4.50 ± 0.55 | 6, 0 | 0.031 |",
        "| RWP over SAM | +0.17 ± 2.86 | 1, 5 | 1 |",
        "| SAM over plain | +4.33 ± 2.66 | 5, 1 | 0.062 |",
    ]
    assert len(pairs_table({name: found[name] for name in ("base", "rwp")}).splitlines()) == 3


def test_the_best_of_a_search_is_that_of_the_mean_over_its_seeds():
    def trial(top1, lr, seed):
        settings = {"lr": lr, "weight_decay": 5e-4, "strength": 0.02}
        return {"method": "rwp", "settings": settings, "top1": top1, "seed": seed}

    trials = [trial(0.5, 0.1, 0), trial(0.6, 0.2, 0), trial(0.9, 0.1, 1), trial(0.7, 0.2, 1)]
    trials += [trial(0.7, 0.2, 1), trial(0.99, 0.4, 1)]  # again in another grid; not with both seeds
    assert best_of_search(trials, "rwp") == {"lr": 0.1, "weight_decay": 5e-4, "strength": 0.02}
    assert search_table(trials).splitlines()[2:] == [
        "| RWP | 0.1, 0.0005, 0.02 | **70.00 ± 28.28** |",
        "| RWP | 0.2, 0.0005, 0.02 | 65.00 ± 7.07 |",
    ]
    assert best_of_search([trial(0.5, 0.2, 0), trial(0.5, 0.1, 0)], "rwp")["lr"] == 0.2


def test_the_title_has_the_task_and_the_seeds():
    assert title({"rwp": runs([4])}) == "Digits, 40 % of the training labels random, 30 epochs: seed 0"
    assert title({"rwp": runs([4, 5])}).endswith("30 epochs: mean ± standard deviation over 2 seeds")
