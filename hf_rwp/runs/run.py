"""A run in its folder: what it goes on from, where it is, what it saves and leaves behind.

    checkpoint, state = find_checkpoint(args)       # and refuses to lose a run that is there
    check_flags(accelerator, flags, state, kept, weights)
    run = Run(accelerator, args, flags, ...)        # when all is built
    run.begin(checkpoint, state, epochs)
    with run:                                       # from here on SIGTERM is noted, and `stop` acts on it
        for epoch in range(len(run.history), epochs):
            run.start_clock()
            ...                                     # `advance` after each step, `save` when it is time
            run.end_epoch(row)
    results = run.finish()

`checkpoint_to_resume`, `refuse_other_flags`, `check_writable` and `agree` stand by themselves, for other trainers.
"""

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from hf_rwp.core.losses import LossTracker
from hf_rwp.core.optimizer import RWP
from hf_rwp.runs.arguments import RunArguments
from hf_rwp.runs.checkpoints import (
    checkpoints_in,
    load_checkpoint,
    newest,
    read_state,
    remove_checkpoints,
    save_checkpoint,
)
from hf_rwp.runs.files import write
from hf_rwp.runs.records import Results, Row, epoch_line, noise_sizes, weights_digest

PREEMPTED = 75  # the exit status after SIGTERM, once a checkpoint is saved: EX_TEMPFAIL, "try again later"
RESULTS = "results.json"
STATE = ("method", "arguments", "replicas", "step", "images", "seconds", "slots", "losses", "history")


def checkpoint_to_resume(
    wanted: str | None, output_dir: Path, checkpoints: Path, last: Path | None, *, finished: bool, overwrite: bool
) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; None without the flag.

    wanted: the flag's value. checkpoints: the folder that this run's checkpoints lie in, last: the newest of them.
    finished: whether output_dir holds a run's results. overwrite: whether a run that is there may be lost. Raises
    FileNotFoundError where there is no last one, FileExistsError where a run would be lost.
    """
    if wanted == "latest":
        if last is None:
            raise FileNotFoundError(
                f"{output_dir} holds no complete checkpoint: start without --resume_from_checkpoint"
            )
        return last
    resume_from = Path(wanted) if wanted else None
    inside = resume_from is not None and resume_from.resolve().parent == checkpoints.resolve()
    if (last or finished) and not (inside or overwrite):
        what = "a finished run" if finished else "the checkpoints of an unfinished run"
        raise FileExistsError(
            f"{output_dir} holds {what}: set another --output_dir, or --resume_from_checkpoint latest to go on, or "
            "--overwrite_output_dir to delete it"
        )
    return resume_from


def find_checkpoint(args: RunArguments) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that the flags name and what a `Run` saved in it; None and {} for a run from the start.

    Raises as `checkpoint_to_resume` does, and ValueError for a checkpoint that is not as it was written and for an
    output_dir that cannot be written to.
    """
    folder = Path(str(args.output_dir))
    checkpoints = folder / "checkpoints"
    found = checkpoint_to_resume(
        args.resume_from_checkpoint,
        folder,
        checkpoints,
        newest(checkpoints),
        finished=(folder / RESULTS).exists(),
        overwrite=args.overwrite_output_dir or args.eval_only,
    )
    state = read_state(found, needed=STATE) if found else {}
    check_writable(folder)
    return found, state


def changed_flags(flags: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """The names of the flags whose values are not those that were saved, as far as both know them."""
    return [name for name in flags if name in saved and flags[name] != saved[name]]


def refuse_other_flags(flags: Mapping[str, Any], saved: Mapping[str, Any], kept: Collection[str], weights: str) -> None:
    """Raise ValueError for a flag whose old value comes back with the checkpoint.

    kept: their names. weights: the flag that starts from nothing but weights, as a user writes it.
    """
    changed = [name for name in changed_flags(flags, saved) if name in kept]
    if changed:
        raise ValueError(
            f"the checkpoint was written with {', '.join(f'{name}={saved[name]!r}' for name in changed)}, and keeps "
            f"that: resume with the same, or start anew from the weights ({weights})"
        )


def check_flags(
    accelerator: Accelerator,
    flags: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    kept: Collection[str],
    harmless: Collection[str],
    weights: str,
) -> None:
    """Raise ValueError for flags that a checkpoint would silently override, warn of others that changed.

    state: as `find_checkpoint` gives. kept, weights: as `refuse_other_flags` takes them. harmless: what may change.
    """
    if not state:
        return
    saved, replicas = state["arguments"], accelerator.num_processes
    refuse_other_flags(flags, saved, kept, weights)
    was = [f"{state['replicas']} replicas and not {replicas}"] if replicas != state["replicas"] else []
    changed = [name for name in changed_flags(flags, saved) if name not in harmless]
    was += [f"{name}={saved[name]!r} and not {flags[name]!r}" for name in changed]
    if was:
        accelerator.print(
            f"warning: the checkpoint was written with {', '.join(was)}. Training goes on after the images that were "
            "seen; what else depends on it (batches, the schedule, noise, which gradients are perturbed) changes, and "
            "it will not end in the same bits",
            file=sys.stderr,
        )


def check_writable(output_dir: Path) -> None:
    """Raise ValueError now, not after the first epoch."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={str(output_dir)!r} cannot be written to ({error}): set another one") from error


def agree(
    accelerator: Accelerator, unreadable: Sequence[int], max_bad_images: int, stop: bool = False
) -> tuple[bool, int]:
    """Whether any replica must stop, and how many images none of them could read. Collective.

    unreadable: the slots of those that this replica could not. Raises ValueError on all replicas for too many.
    """
    stops, count = accelerator.reduce(torch.tensor([stop, len(unreadable)], device=accelerator.device)).tolist()
    if count:  # replicas may have met some alike
        count = len(set().union(*gather_object([list(unreadable)])))
    if count > max_bad_images:
        raise ValueError(
            f"{count} images could not be read, more than max_bad_images={max_bad_images}: the warnings above name "
            "them. Repair or remove them, or raise max_bad_images"
        )
    return stops > 0, count


def on_main(accelerator: Accelerator, function: Callable[[], object], expected: type[Exception]) -> None:
    """Call `function` on the main process. Collective: the error `expected` of it is raised on all replicas."""
    failure = None
    if accelerator.is_main_process:
        try:
            function()
        except expected as error:
            failure = str(error)
    failures = [text for text in gather_object([failure]) if text]
    if failures:
        raise expected(failures[0])


def accuracy_of(row: Row) -> float:
    """What tells which epoch was the best."""
    return row["top1_ema"] if "top1_ema" in row else row["top1"]


class Background(Protocol):
    """Pushes a folder beside the training: `hf_rwp.hub.push.BackgroundPush`."""

    @property
    def busy(self) -> bool: ...
    def start(self, folder: Path, message: str) -> None: ...
    def finish(self) -> None: ...
    def stop(self) -> None: ...


@dataclass
class Run:
    """A run, from its beginning or a checkpoint on. Every replica calls its methods, but where they say otherwise.

    flags: all of them, as checkpoints and results have them. facts: what else is in the results beside the figures.
    module: the model; averages: of its weights, by the names of their files in a checkpoint; trained: which of them a
    user gets. write_model: writes a folder with the trained weights as they are, and what goes to the Hub with them.
    background: pushes that folder after each save, with only_best after epochs that improve.

    step: optimizer steps behind it. images, seconds: what is behind it of the epoch under way, over all replicas.
    history: a row for each epoch. preempted: whether SIGTERM came.
    """

    accelerator: Accelerator
    args: RunArguments
    flags: Mapping[str, Any]
    facts: Mapping[str, Any]
    module: nn.Module
    averages: Mapping[str, nn.Module]
    trained: nn.Module
    tracker: LossTracker
    rwp: RWP | None
    write_model: Callable[[Path, Results], None]
    background: Background | None = None
    only_best: bool = False

    step: int = field(default=0, init=False)
    images: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    history: list[Row] = field(default_factory=list, init=False)
    preempted: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.folder = Path(str(self.args.output_dir))
        self.checkpoints, self.results_file = self.folder / "checkpoints", self.folder / RESULTS
        self.model_folder, self.best_folder = self.folder / "model", self.folder / "best"
        self._slots_before = {"clean": 0, "perturbed": 0}

    def begin(self, checkpoint: Path | None, state: Mapping[str, Any], epochs: int) -> None:
        """Load what `find_checkpoint` found, and delete what the folder holds beyond it.

        Raises ValueError for a checkpoint of another method, or of more epochs.
        """
        if checkpoint is not None:
            method, history = state["method"], state["history"]
            if method != self.flags["method"] or len(history) > epochs:
                raise ValueError(
                    f"{checkpoint.name} is from epoch {len(history)} of method {method!r}: resume it with that method "
                    f"and at least as many epochs, not with {self.flags['method']!r} and epochs={epochs}"
                )
            self.step, self.images, self.seconds = state["step"], state["images"], state["seconds"]
            self.history, self._slots_before = history, state["slots"]
            load_checkpoint(self.accelerator, checkpoint, self.averages)
            self.tracker.load_state_dict(state["losses"])
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.results_file.unlink(missing_ok=True)
            behind = [step for step in checkpoints_in(self.checkpoints) if step <= self.step]
            remove_checkpoints(self.checkpoints, keep=behind)

    def __enter__(self) -> "Run":
        self._handler = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._handler)
        if kind is not None and self.background is not None:
            self.background.stop()

    def _note(self, *_: object) -> None:
        self.preempted = True

    def start_clock(self) -> None:
        """Training in an epoch begins, or goes on."""
        self._started = time.perf_counter() - self.seconds

    def advance(self, images: int) -> None:
        """An optimizer step is done, of so many images over all replicas."""
        self.step += 1
        self.images += images

    def read_clock(self) -> float:
        """Seconds of training in this epoch so far."""
        self.seconds = time.perf_counter() - self._started
        return self.seconds

    def rwp_report(self) -> dict[str, Any]:
        """What RWP did since the run began, earlier sessions of it included; empty without RWP."""
        if self.rwp is None:
            return {}
        found = self.rwp.report()
        slots = {kind: self._slots_before[kind] + count for kind, count in found["slots"].items()}
        return {**found, "slots": slots, "gamma": self.rwp.defaults["rwp_gamma"]}

    def save(self) -> None:
        """Write a checkpoint of where the run is; older ones beyond the limit go, but the best."""
        if self.images:
            self.read_clock()
        state = {
            "method": self.flags["method"],
            "replicas": self.accelerator.num_processes,
            "arguments": self.flags,
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "slots": self.rwp_report().get("slots", self._slots_before),
            "losses": self.tracker.state_dict(),
            "history": self.history,
        }
        save_checkpoint(self.accelerator, self.checkpoints / f"step_{self.step}", state, self.averages)
        if self.accelerator.is_main_process:
            kept = list(checkpoints_in(self.checkpoints))[-self.args.save_total_limit :]
            best = [self._best()["step"]] if self.history else []
            remove_checkpoints(self.checkpoints, keep=kept + best)
            self._publish(improved=not self.images and self.step in best)

    def end_epoch(self, row: Row) -> None:
        """Take an epoch's row into the history, save, and report it."""
        self.history.append(row)
        self.images, self.seconds = 0, 0.0
        self.tracker.reset()
        self.accelerator.log({name: value for name, value in row.items() if isinstance(value, float)}, step=self.step)
        self.save()
        if self.rwp and len(self.history) == 1:
            self.accelerator.print(f"noise / weights: {noise_sizes(row['rwp']) or 'none yet'}")
        self.accelerator.print(epoch_line(row))

    def stop(self) -> None:
        """Exit with the status `PREEMPTED`, after a save."""
        if self.background is not None:
            self.background.stop()
        said = f"SIGTERM: saved step {self.step}; --resume_from_checkpoint latest goes on"
        self.accelerator.print(said, file=sys.stderr)
        self.accelerator.end_training()
        raise SystemExit(PREEMPTED)

    def results(self) -> Results:
        """What results.json would hold now. The main process calls it by itself."""
        last = self.history[-1] if self.history else Row()
        return {
            "final": last if last.get("step") == self.step else {"step": self.step},
            "seconds": sum(row["seconds"] for row in self.history) + self.seconds,
            "weights_sha256": weights_digest(self.trained),
            "arguments": self.flags,
            **self.facts,  # type: ignore[typeddict-item]
            "history": self.history,
        }

    def finish(self) -> Results | None:
        """Write the model and the results, which are those of the last epoch; None but on the main process."""
        digests = gather_object([weights_digest(self.module)])
        if not self.accelerator.is_main_process:
            return None
        results = self.results()
        results["replicas_sha256"] = sorted(set(digests))
        self.write_model(self.model_folder, results)
        write(self.results_file, json.dumps(results, indent=2))
        return results

    def write_best(self) -> Path:
        """Write the weights of the best epoch, which the model has from then on; returns their folder.

        The main process calls it by itself.
        """
        best = self._best()
        checkpoint = self.checkpoints / f"step_{best['step']}"
        if not checkpoint.exists():  # a run that goes on from elsewhere
            print(
                f"warning: the best checkpoint, {checkpoint}, is missing: the last weights are pushed", file=sys.stderr
            )
            return self.model_folder
        for name, of in {"model": self.module, **self.averages}.items():  # accelerate saves what it has wrapped
            load_model(of, checkpoint / f"{name}.safetensors")
        results = self.results()
        results["final"], results["chosen"] = best, "best"
        self.write_model(self.best_folder, results)
        return self.best_folder

    def _best(self) -> Row:
        return max(self.history, key=accuracy_of)

    def _publish(self, improved: bool) -> None:
        """Push the weights as they are in the background, if it is time."""
        if self.background is None or self.background.busy or (self.only_best and not improved):
            return  # the last push has the best weights anyway
        folder = self.best_folder if self.only_best else self.model_folder
        try:
            self.write_model(folder, self.results())
            self.background.start(folder, f"Step {self.step}")
        except (OSError, RuntimeError, SafetensorError) as error:
            print(f"warning: nothing is pushed at step {self.step}: {error}. Training goes on", file=sys.stderr)
