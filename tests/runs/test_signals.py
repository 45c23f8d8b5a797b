"""runs/signals.py: what is noted, and what ends the process."""

import os
import signal

import pytest

from hf_rwp.runs.signals import INTERRUPTED, PREEMPTED, Signals, Terminated, name_and_status, raised_at_sigterm


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


def test_elsewhere_sigterm_ends_what_ctrl_c_would():
    def work():
        with raised_at_sigterm():
            with Signals() as signals:  # of a run that saves
                send(signal.SIGTERM)
            assert signals.seen is signal.SIGTERM
            send(signal.SIGTERM)

    with pytest.raises(Terminated) as stopped:
        work()
    assert name_and_status(stopped.value) == ("SIGTERM", 143)
    assert name_and_status(KeyboardInterrupt()) == ("Ctrl-C", 130)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_forked_worker_ends_at_sigterm_without_a_word(capfd):
    with raised_at_sigterm():
        worker = os.fork()
        if worker == 0:
            send(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_whatever_handles_sigterm_already_stays():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with raised_at_sigterm():
            send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


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
