"""A measurement in pieces, in processes of their own: what is kept of one that is cut."""

import json
import os
from functools import partial
from pathlib import Path

import pytest

from hf_rwp.analysis import pieces
from hf_rwp.analysis.pieces import Piece, kept_pieces, measure_pieces, round_done, total_rounds
from hf_rwp.runs.progress import Progress

FACTS = {"arguments": {"rounds": 2}, "date": "2026-01-01"}


@pytest.fixture(autouse=True)
def server_of_the_tests(monkeypatch):
    """There is one to fork from, and others need what it has imported."""
    monkeypatch.setattr(pieces.multiprocessing, "set_forkserver_preload", lambda modules: None)


def work(value, rank, ranks, args, folder):
    """Three rounds; what it finds is whose it is. Fails where the arguments say so."""
    for _ in range(3):
        if rank == 0:
            round_done(folder)
    if value == args:
        raise ValueError("cut")
    Path(folder, str(rank)).write_text(json.dumps([value, rank, ranks, os.getpid()]))


def measured(names, kept, fails=None, facts=FACTS):
    every = {name: Piece(partial(work, name), ranks=2, rounds=3) for name in names}
    progress = Progress(total_rounds([*every.values()]), shown=False)
    found = measure_pieces(every, fails, kept, facts, progress)
    assert progress.done == progress.steps
    return found


def test_every_rank_of_a_piece_is_a_process_of_its_own(tmp_path):
    found = measured(["a", "b"], tmp_path / "kept")
    assert [rank[:3] for rank in found["a"]] == [["a", 0, 2], ["a", 1, 2]]
    assert len({rank[3] for ranks in found.values() for rank in ranks} | {os.getpid()}) == 5


def test_what_is_measured_is_kept_at_once_and_not_measured_again(tmp_path):
    kept = tmp_path / "results" / "kept"
    with pytest.raises(Exception, match="cut"):
        measured(["a", "b", "c"], kept, fails="b")
    (before,) = kept_pieces(kept, FACTS).values()
    found = measured(["a", "b", "c"], kept, facts=FACTS | {"date": "2026-01-02"})
    assert found["a"] == before  # by the same processes
    assert list(kept_pieces(kept, FACTS)) == ["a", "b", "c"]


def test_pieces_of_another_measurement_are_not_taken(tmp_path):
    kept = tmp_path / "kept"
    before = measured(["a"], kept)
    assert kept_pieces(kept, FACTS | {"arguments": {"rounds": 3}}) == {}
    assert measured(["a"], kept, facts=FACTS | {"git_commit": "other"}) != before
    kept.write_text('{"pieces": ')
    assert kept_pieces(kept, FACTS) == {}


def endless(rank, ranks, args, folder):
    round_done(folder)
    while True:
        pass


def test_nothing_is_left_running_after_an_interrupt(monkeypatch):
    begun, original = [], pieces.start_processes
    monkeypatch.setattr(pieces, "start_processes", lambda *a, **k: begun.append(original(*a, **k)) or begun[-1])

    def interrupt(rounds):
        if rounds:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pieces.start(Piece(endless), None, interrupt)
    ((process,),) = [context.processes for context in begun]
    process.join(60)
    assert not process.is_alive()
