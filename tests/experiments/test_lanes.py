"""Progress in a pipe: lines, not too many; on a terminal see tests/recipes/test_demo.py."""

from hf_rwp.experiments import lanes
from hf_rwp.experiments.lanes import Lanes


def lines(capsys, epochs, label="", seconds=1.0, monkeypatch=None):
    clock = iter(range(10_000))
    monkeypatch.setattr(lanes.time, "monotonic", lambda: seconds * next(clock))
    with Lanes(["plain", "RWP"], epochs, label) as shown:
        for epoch in range(1, epochs + 1):
            shown.show("plain", {"top1": 0.5, "gradients": epoch, "seconds": 1.0})
            shown.show("RWP", {"top1": 0.625, "gradients": epoch, "seconds": 2.0})
            shown.end_epoch(epoch)
    return capsys.readouterr().out.splitlines()


def test_a_line_every_tenth_with_the_time_left(capsys, monkeypatch):
    found = lines(capsys, 30, monkeypatch=monkeypatch)
    assert len(found) == 10
    assert found[0] == "epoch  3/30: plain 50.0 %, RWP 62.5 %; 3 s, 27 s left"
    assert found[-1] == "epoch 30/30: plain 50.0 %, RWP 62.5 %; 30 s, done"


def test_few_epochs_have_a_line_each_and_slow_ones_too(capsys, monkeypatch):
    assert len(lines(capsys, 2, monkeypatch=monkeypatch)) == 2
    slow = lines(capsys, 20, "seed 3", seconds=70.0, monkeypatch=monkeypatch)
    assert len(slow) == 20
    assert slow[0].startswith("seed 3, epoch  1/20: ")
