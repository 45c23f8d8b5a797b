"""What measures a step, against facts known otherwise."""

import time

import torch

from hf_rwp.analysis import timing

CPU = torch.device("cpu")


def test_a_function_has_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert timing.on_one_thread(torch.get_num_threads) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_steps_take_turns_and_the_slower_one_is_slower():
    seen = []
    steps = {
        "fast": lambda number: seen.append(("fast", number)),
        "slow": lambda number: (seen.append(("slow", number)), time.sleep(0.002)),
    }
    seconds = timing.seconds_in_turns(steps, CPU, rounds=2, count=3)
    assert seen == [(name, 3 * turn + at) for turn in range(3) for name in steps for at in range(3)]
    assert seconds["slow"] >= 0.002
    assert 0 < seconds["fast"] < seconds["slow"]


def test_peak_memory_is_what_a_function_holds_at_once():
    peak = timing.peak_bytes(lambda: [torch.empty(1000) for _ in range(3)], CPU)
    assert peak == 3 * 4000
