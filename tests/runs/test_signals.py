"""runs/signals.py: what is noted, and what ends the process."""

import os
import signal

import pytest

from hf_rwp.runs.signals import INTERRUPTED, PREEMPTED, Signals


def send(*kinds):
    for kind in kinds:
        os.kill(os.getpid(), kind)


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        ([signal.SIGTERM], PREEMPTED, "SIGTERM: saved step 3"),
        ([signal.SIGTERM, signal.SIGTERM], PREEMPTED, "SIGTERM: saved step 3"),
        ([signal.SIGINT], INTERRUPTED, "Ctrl-C: saved step 3"),
        ([signal.SIGTERM, signal.SIGINT], INTERRUPTED, "Ctrl-C: saved step 3"),
        ([], PREEMPTED, "SIGTERM: saved step 3"),  # of a replica that another one told
    ],
)
def test_the_first_is_noted(sent, status, said):
    before = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    with Signals() as signals:
        send(*sent)
        assert signals.seen == (sent[-1] if sent else None)
        assert signals.status == status
        assert signals.saved(3, "outputs/a") == f"{said}; --resume_from_checkpoint outputs/a goes on"
        assert signals.saved(3, "my runs/a").endswith("; --resume_from_checkpoint 'my runs/a' goes on")
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_after_ctrl_c_ends_at_once(second):
    with pytest.raises(KeyboardInterrupt), Signals():
        send(signal.SIGINT, second)


def test_ctrl_c_says_what_happens_once_and_a_forked_worker_nothing(capfd):
    with Signals() as signals:
        worker = os.fork()
        if worker == 0:
            send(signal.SIGINT)
            os._exit(signals.seen == signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 1
        assert signals.seen is None
        assert capfd.readouterr().err == ""
        send(signal.SIGINT)
    said = capfd.readouterr().err
    assert "saves a checkpoint and stops" in said
    assert "again to stop at once" in said
