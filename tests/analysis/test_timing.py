"""What measures a step, against facts known otherwise."""

import sys
import threading
import time

import distributed
import pytest
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


def peaks_of_a_thread():
    """What two ways of measuring see of 32 MB that another thread holds for a while."""

    def make():
        def work():
            thread = threading.Thread(target=lambda: torch.ones(2**23).sum())
            thread.start()
            thread.join()

        return work

    return timing.peak_bytes(make(), CPU), timing.peak_of_process(make, CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_process_is_that_of_all_its_threads():
    ((seen, peak),) = distributed.run(1, peaks_of_a_thread)
    assert seen < 2**20  # the calling thread's
    assert peak == pytest.approx(2**25, rel=0.05)
