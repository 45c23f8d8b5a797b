"""What the records of plain LoRA and of noise on its base say, by hand-made records."""

import json

import pytest

from hf_rwp.experiments import forgetting


def record(arm, seed, path, loss=1.0, before=(0.0, 0.4), lr="1e-3"):
    """path: accuracy and loss on known text at each evaluation."""
    history = [{"step": 50 * (i + 1), "accuracy": a, "known_loss": k} for i, (a, k) in enumerate(path)]
    final = {"accuracy": path[-1][0], "known_loss": path[-1][1], "eval_loss": loss}
    final |= {"accuracy_before": before[0], "known_loss_before": before[1]}
    facts = {"hardware": {"device": "cpu", "threads": 1}, "versions": {"torch": "2"}, "date": "2026-01-01"}
    facts |= {"cpu_seconds": 36.0, "load_average": 1.5, "command": f"run --learning_rate={lr} --rwp_gamma=0.05"}
    return {"arm": arm, "seed": seed, "history": history, "final": final, **facts}


def test_forgetting_is_read_off_where_a_run_first_reaches_an_accuracy():
    run = record("plain", 0, [(0.2, 1.4), (0.1, 2.0), (0.5, 3.0), (0.4, 5.0)])
    assert forgetting.known_loss_at(run, 0.1) == pytest.approx(0.9)  # half the way from the base
    assert forgetting.known_loss_at(run, 0.2) == pytest.approx(1.4)
    assert forgetting.known_loss_at(run, 0.3) == pytest.approx(2.5)  # half the way from 0.1 to 0.5
    assert forgetting.known_loss_at(run, 0.6) is None
    assert forgetting.known_loss_at(run, 0.0) == 0.4


def search():
    return [
        record("plain", 100, [(0.5, 3.0)], loss=0.9),
        record("plain", 100, [(0.5, 3.0)], loss=0.8, lr="2e-3"),
        record("adapters", 100, [(0.46, 3.0)]),
        record("adapters", 100, [(0.4, 3.0)], loss=0.1),
        record("frozen", 100, [(0.6, 3.0)]),
        record("frozen", 100, [(0.3, 3.0)]),
    ]


def test_settings_are_the_best_of_the_search_and_the_set_accuracy_follows_from_them():
    best = forgetting.chosen(search())
    assert {arm: run["final"]["accuracy"] for arm, run in best.items()} == {
        "plain": 0.5,
        "adapters": 0.46,
        "frozen": 0.6,
    }
    assert forgetting.settings(best["plain"]) == "lr 2e-3, gamma 0.05"
    assert forgetting.set_accuracy(search()) == 0.36  # of 0.46 0.8, rounded down


def judged(gain, less, seeds=8):
    runs = []
    for seed in range(seeds):
        wobble = 0.001 * seed
        runs.append(record("plain", 10 + seed, [(0.2, 2.0), (0.5 + wobble, 3.0)]))
        runs.append(record("adapters", 10 + seed, [(0.2, 2.0), (0.5 + wobble, 3.0)]))
        runs.append(record("frozen", 10 + seed, [(0.2, 2.0 - less), (0.5 + 2 * wobble + gain, 3.0 - less)]))
    return runs


def written(tmp_path, runs):
    for name, records in {"search": search(), "sums": runs}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return "\n".join(forgetting.section(tmp_path))


def test_the_page_has_every_arm_every_pair_and_the_verdicts_of_the_plan(tmp_path):
    text = written(tmp_path, judged(gain=0.05, less=0.5))
    assert "seeds 10 to 17" in text
    assert "0.30 CPU hours" in text  # 30 runs of 36 seconds
    for arm in forgetting.ARMS.values():
        assert f"| {arm} |" in text
    assert "| noise on base and adapters - plain LoRA | +5.35 (+5.15 to +5.55), p 0.00781 |" in text
    assert "held-out accuracy (points): more by 5.35 (p 0.00781, with Holm's correction 0.0156)" in text
    assert "known text at 36% (nats): less by 0.5" in text
    assert "Not in the plan, and no claim" in text


def test_what_is_not_told_apart_is_said_and_whether_that_is_for_sure(tmp_path):
    assert "(points): not told apart, and no difference of a size that matters" in written(
        tmp_path, judged(-0.0035, 0.0)
    )
    runs = judged(0.0, 0.0)
    for run in runs:
        if run["arm"] == "frozen":
            run["final"]["accuracy"] += 0.05 * (-1) ** run["seed"]
    assert "(points): not told apart, and it is open" in written(tmp_path, runs)


def test_seeds_that_never_reach_the_accuracy_are_left_out_and_few_make_no_test(tmp_path):
    runs = judged(0.0, 0.0)
    for run in runs:
        if run["arm"] == "frozen" and run["seed"] < 13:
            run["history"][-1]["accuracy"] = 0.3
    text = written(tmp_path, runs)
    assert "no test, 3 left out" in text
    assert "known text at 36% (nats): no test, seeds: 5" in text
    assert "(5 of 8)" in text


def test_nothing_is_said_where_nothing_was_run(tmp_path):
    assert forgetting.section(tmp_path) == []


def test_forgetting_is_also_compared_at_accuracies_that_both_runs_of_a_seed_reach():
    ours = [record("frozen", 1, [(0.2, 1.0), (0.4, 2.0)]), record("frozen", 2, [(0.1, 1.0)])]
    theirs = [record("plain", 1, [(0.1, 3.0), (0.5, 5.0)])]
    # At 0.32: 0.6 of the way from 1 to 2, and 0.55 of that from 3 to 5.
    assert forgetting.at_accuracies_of_their_own(ours, theirs) == [pytest.approx(1.6 - 4.1)]
