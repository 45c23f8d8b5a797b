"""A long measurement in pieces, each in processes of its own; what is measured is on disk as soon as it is.

    pieces = {"resnet18, 2 ranks": Piece(partial(run_steps, "resnet18"), ranks=2, rounds=11), ...}
    found = measure_pieces(pieces, args, kept, facts)

A run that was cut goes on with the pieces that it lacks.
"""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.multiprocessing import start_processes  # type: ignore[attr-defined]

ROUNDS = "rounds"  # a file that grows by a byte a round
_PRELOADED = ["timm.data", "datasets", "hf_rwp.runs.parsing"]  # imported once for all


@dataclass(frozen=True)
class Piece:
    """run: takes a rank, the number of ranks, the arguments and a folder, and leaves what it found as JSON there, in a
    file named after the rank. rounds: of work, each of which `round_done` tells."""

    run: Callable[..., None]
    ranks: int = 1
    rounds: int = 1


def round_done(folder: str) -> None:
    """Tell whoever waits that a round is over; on one rank."""
    with Path(folder, ROUNDS).open("a") as file:
        file.write(".")


def start(piece: Piece, args: Any, tell: Callable[[int], None] = lambda _: None) -> list[Any]:
    """Run a piece in its processes; what each of them found. tell: takes how many rounds are behind it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes notes of its own on the screen
    multiprocessing.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        rounds = Path(folder, ROUNDS)
        rounds.touch()
        options: dict[str, Any] = {"nprocs": piece.ranks, "start_method": "forkserver", "join": False}
        processes: Any = start_processes(piece.run, (piece.ranks, args, folder), **options)
        try:
            while not processes.join(timeout=0.5):
                tell(min(rounds.stat().st_size, piece.rounds))
        finally:
            for process in processes.processes:  # none is alive, but after an interrupt
                process.kill()
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(piece.ranks)]


def measure_pieces(
    pieces: Mapping[str, Piece], args: Any, kept: Path, facts: Mapping[str, Any], progress: Any
) -> dict[str, list[Any]]:
    """What each piece found, by its title; those in the file `kept` already, under the same facts, are not run again.

    facts: of what is measured, where and with what. progress: `hf_rwp.runs.progress.Progress`, of all rounds.
    """
    found = kept_pieces(kept, facts)
    for title, piece in pieces.items():
        progress.begin(title)
        end = progress.done + piece.rounds
        if title not in found:
            begin = progress.done

            def tell(rounds: int, begin: int = begin) -> None:
                progress.advance(begin + rounds - progress.done)

            found[title] = start(piece, args, tell)
            _keep(kept, facts, found)
        progress.advance(end - progress.done)
    return found


def kept_pieces(kept: Path, facts: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What an earlier run that was cut left in its file; nothing of a run under other facts."""
    try:
        before = json.loads(kept.read_text(encoding="utf-8"))
        pieces: dict[str, list[Any]] = before["pieces"]
        now = json.loads(json.dumps({**facts, "date": before["facts"]["date"]}))
        return pieces if before["facts"] == now else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def total_rounds(pieces: Sequence[Piece]) -> int:
    return sum(piece.rounds for piece in pieces)


def _keep(kept: Path, facts: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_name(f"{kept.name}.partial")
    partial.write_text(json.dumps({"facts": facts, "pieces": found}))
    partial.replace(kept)
