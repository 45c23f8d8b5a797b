"""Lines and the bar of runs/progress.py, by a clock of the tests' own and on a terminal that is none."""

import itertools
import logging
import re
import sys

import pytest
from terminal import on_stderr

from hf_rwp.runs.progress import Progress, epoch_figures


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def watched(capsys, seconds_of_an_epoch, epochs, updates=100, begin_at=0):
    """What is printed of epochs that last so long: (when, line) of each."""
    clock, said = Clock(), []
    progress = Progress(epochs * updates, part=updates, done=begin_at, images=64, clock=clock)
    for epoch in range(epochs):
        progress.begin(f"epoch {epoch + 1}/{epochs}")
        progress.note(loss=0.5 - epoch / 10)
        for update in range(updates):
            if epoch * updates + update < begin_at:
                continue
            clock.now += seconds_of_an_epoch / updates
            progress.advance()
            said += [(clock.now, line) for line in capsys.readouterr().out.splitlines()]
        progress.say(progress.line(epoch_figures({"train_loss": 0.5, "top1": 0.25, "images_per_second": 64.0})))
        said += [(clock.now, line) for line in capsys.readouterr().out.splitlines()]
    return said


def test_epochs_of_seconds_have_a_line_each(capsys):
    said = watched(capsys, 3, epochs=4)
    assert [line for _, line in said] == [
        "epoch 1/4 done: loss 0.5000, top-1 25.00%, 64 images/s, 00:09 left",
        "epoch 2/4 done: loss 0.5000, top-1 25.00%, 64 images/s, 00:06 left",
        "epoch 3/4 done: loss 0.5000, top-1 25.00%, 64 images/s, 00:03 left",
        "epoch 4/4 done: loss 0.5000, top-1 25.00%, 64 images/s",
    ]


def test_epochs_of_minutes_have_ten_lines_each(capsys):
    said = watched(capsys, 300, epochs=2)
    assert [round(when) for when, _ in said] == list(range(30, 601, 30))
    assert said[0][1] == "epoch 1/2, step 10/200: loss 0.5000, 21 images/s, 09:30 left"
    assert said[10][1] == "epoch 2/2, step 110/200: loss 0.4000, 21 images/s, 04:30 left"


def test_a_line_has_the_loss_only_if_no_line_before_had_it(capsys):
    said = [line for _, line in watched(capsys, 300, epochs=2)]
    assert [number for number, line in enumerate(said) if "loss" in line] == [0, 9, 10, 19]  # 9 and 19 are the ends
    assert said[1] == "epoch 1/2, step 20/200: 21 images/s, 09:00 left"
    progress = Progress(100, part=50, clock=Clock())
    progress.begin("epoch 1/2")
    progress.note(loss=0.25)  # of the whole epoch, which has a line of its own
    progress.begin("epoch 2/2")
    assert progress.line() == "epoch 2/2, step 0/100"


def test_epochs_of_hours_have_a_line_a_minute(capsys):
    said = watched(capsys, 3 * 3600, epochs=2, updates=10_000)
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(said)]
    assert max(gaps) < 62
    assert len(said) == pytest.approx(360, rel=0.05)
    assert max(len(line) for _, line in said) <= 80


def test_time_left_is_foretold_from_this_session_alone(capsys):
    """A run that goes on in the middle of an epoch: its first session had another speed."""
    said = watched(capsys, 300, epochs=2, begin_at=150)
    assert said[1][1] == "epoch 2/2, step 160/200: loss 0.4000, 21 images/s, 02:00 left"


def test_a_slow_process_and_one_of_many_print_what_they_should(capsys):
    clock = Clock()
    progress = Progress(10, images=1, unit="batches", step="batch", clock=clock)
    progress.begin("one")
    for _ in range(3):
        clock.now += 100
        progress.advance()
    assert capsys.readouterr().out.splitlines() == [
        "one, batch 1/10: 0.01 batches/s, 15:00 left",
        "one, batch 2/10: 0.01 batches/s, 13:20 left",
        "one, batch 3/10: 0.01 batches/s, 11:40 left",
    ]
    other = Progress(10, shown=False, clock=clock)
    other.begin("other")
    clock.now += 1000
    other.advance()
    other.say("nothing")
    assert capsys.readouterr().out == ""


def test_a_terminal_has_one_bar_with_the_time_left_for_all_of_it(monkeypatch, capsys):
    with on_stderr(monkeypatch) as written:
        progress = Progress(40, part=10, images=64)
        for epoch in range(4):
            progress.begin(f"epoch {epoch + 1}/4")
            progress.note(loss=0.25)
            for _ in range(10):
                progress.advance()
                progress._bar.refresh()
            progress.say(f"line {epoch}")
        progress.close()
        drawn = written()
    shown = [text for text in re.split(r"[\r\n]", drawn) if "%|" in text]
    assert max(map(len, shown)) <= 80
    percents = [int(re.search(r"(\d+)%", text)[1]) for text in shown]
    assert percents == sorted(percents)  # it never begins anew
    assert percents[-1] == 100
    assert re.search(r"epoch 3/4:  6\d%\|.* \d\d:\d\d left, loss 0\.2500, [\d,]+ images/s", drawn), drawn
    assert drawn.rstrip("\r").rsplit("\r", 1)[-1].strip() == ""  # nothing of it stays
    assert capsys.readouterr().out.splitlines() == [f"line {epoch}" for epoch in range(4)]


@pytest.mark.parametrize("name", ["hf_rwp.images.loaders", "transformers.trainer", "huggingface_hub.utils"])
def test_a_warning_has_a_line_of_its_own_beside_the_bar(monkeypatch, caplog, name):
    caplog.set_level(logging.WARNING, logger=name)  # whatever a library was told before
    handlers = logging.getLogger().handlers[:]
    with on_stderr(monkeypatch) as written:
        progress = Progress(4)
        library = name.partition(".")[0]
        if library != "hf_rwp":
            monkeypatch.setattr(logging.getLogger(library), "handlers", [logging.StreamHandler(sys.stderr)])
        progress.begin("epoch 1/1")
        progress.advance()
        progress._bar.refresh()
        logging.getLogger(name).warning("unreadable image, row 3")
        progress.close()
        drawn = written()
    assert drawn.count("unreadable image, row 3") == 1
    before = drawn.partition("unreadable image, row 3")[0]
    assert before.endswith(("\r", "\n"))  # at the start of a line that the bar was wiped from
    assert logging.getLogger().handlers == handlers
