"""A run in its folder: where it is, what it saves and leaves behind; `resuming` finds what it goes on from.

    run = Run(accelerator, args, flags, ...)        # when all is built
    run.begin(checkpoint, state, epochs, updates, images)
    with run:                                       # from here on SIGTERM and Ctrl-C are noted, and `stop` acts on them
        for epoch in range(len(run.history), epochs):
            run.start_clock("epoch 1/10")
            ...                                     # `advance` after each step, `log` and `save` when it is time
            run.end_epoch(row)
    run.finish("train")

`agree` stands by itself, for other trainers.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from hf_rwp.core.buffers import sync_buffers
from hf_rwp.core.losses import LossTracker
from hf_rwp.core.optimizer import RWP
from hf_rwp.runs.arguments import RunArguments
from hf_rwp.runs.checkpoints import checkpoints_in, load_checkpoint, newest, remove_checkpoints, save_checkpoint
from hf_rwp.runs.closing import commands, last_screen, noise_sizes
from hf_rwp.runs.deepspeed import is_engine
from hf_rwp.runs.distributed_checkpoints import load_weights
from hf_rwp.runs.divergence import refuse_meaningless
from hf_rwp.runs.files import as_json, write
from hf_rwp.runs.given import save_flags
from hf_rwp.runs.progress import Progress, epoch_figures, nothing_left
from hf_rwp.runs.records import Results, Row, weights_digest, with_by_class, without_by_class
from hf_rwp.runs.resuming import RESULTS
from hf_rwp.runs.sharded import gather_into, is_mesh, processes_per_replica
from hf_rwp.runs.signals import Signals
from hf_rwp.runs.tracking import begin_tracking


def agree(
    accelerator: Accelerator, unreadable: Sequence[int], max_bad_images: int, stop: bool = False
) -> tuple[bool, int]:
    """Whether any replica must stop, and how many images none of them could read. Collective.

    unreadable: the slots of those that this replica could not. Raises ValueError on all replicas for too many.
    """
    stops, count = accelerator.reduce(torch.tensor([stop, len(unreadable)], device=accelerator.device)).tolist()
    if count:  # replicas may have met some alike
        count = len(slots_of_all(unreadable))
    if count > max_bad_images:
        raise ValueError(
            f"{count} images could not be read, more than max_bad_images={max_bad_images}: the warnings above name "
            "them. Repair or remove them, or raise max_bad_images"
        )
    return stops > 0, count


def slots_of_all(unreadable: Sequence[int]) -> list[int]:
    """The slots of images that any replica could not read, in order. Collective. unreadable: those of this replica."""
    return sorted(set().union(*gather_object([list(unreadable)])))


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


class Unreadable(Protocol):
    """The images that could not be read: `hf_rwp.images.loaders.UnreadableImages`."""

    @property
    def slots(self) -> list[int]: ...
    def restore(self, slots: Sequence[int]) -> None: ...


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
    whole: where the weights are sharded, the main process's copy that write_model writes; it takes the trained weights
    with every save.
    background: pushes that folder after each save, with only_best after epochs that improve.

    unreadable: the training images that could not be read, which a checkpoint remembers.

    step: optimizer steps behind it. images, seconds: what is behind it of the epoch under way, over all replicas.
    history: a row for each epoch.
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
    whole: nn.Module | None = None
    unreadable: Unreadable | None = None

    step: int = field(default=0, init=False)
    images: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    history: list[Row] = field(default_factory=list, init=False)
    signals: Signals = field(default_factory=Signals, init=False)

    @property
    def preempted(self) -> bool:
        """Whether SIGTERM or Ctrl-C came."""
        return self.signals.seen is not None

    def __post_init__(self) -> None:
        self.folder = Path(str(self.args.output_dir))
        self.checkpoints, self.results_file = self.folder / "checkpoints", self.folder / RESULTS
        self.model_folder, self.best_folder = self.folder / "model", self.folder / "best"
        self._slots_before = {"clean": 0, "perturbed": 0}

    def begin(self, checkpoint: Path | None, state: Mapping[str, Any], epochs: int, updates: int, images: int) -> None:
        """Load what `find_checkpoint` found, delete what the folder holds beyond it, and start the trackers.

        updates: optimizer steps of an epoch. images: of a step, over all replicas.
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
            if self.unreadable is not None:
                self.unreadable.restore(state.get("unreadable", []))  # which older checkpoints lack
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            save_flags(self.folder, self.args.given.flags)
            self.results_file.unlink(missing_ok=True)
            behind = [step for step in checkpoints_in(self.checkpoints) if step <= self.step]
            remove_checkpoints(self.checkpoints, keep=behind)
        begin_tracking(self.accelerator, self.folder, self.flags, self.step, resumed=checkpoint is not None)
        done, main = len(self.history) * updates + self.images // images, self.accelerator.is_main_process
        self.progress = Progress(epochs * updates, part=updates, done=done, images=images, shown=main)
        if len(self.history) == epochs:
            self.progress.say(nothing_left(f"{epochs} epochs", "--epochs"))

    def __enter__(self) -> "Run":
        self.signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.signals.__exit__()
        self.progress.close()
        if kind is not None and self.background is not None:
            self.background.stop()

    def start_clock(self, label: str) -> None:
        """Training in an epoch begins, or goes on. label: of the epoch, for those who watch."""
        self.progress.begin(label)
        self._started = time.perf_counter() - self.seconds

    def advance(self, images: int) -> None:
        """An optimizer step is done, of so many images over all replicas."""
        self.step += 1
        self.images += images
        self.progress.advance()

    def log(self, losses: Mapping[str, float], learning_rate: float) -> None:
        """Send figures of the last steps to the trackers, and to those who watch. losses: of `LossTracker.compute`."""
        gamma = {} if self.rwp is None else {"gamma": max(group["rwp_gamma"] for group in self.rwp.param_groups)}
        self.accelerator.log({**losses, "learning_rate": learning_rate, **gamma}, step=self.step)
        if losses:
            self.progress.note(loss=losses["loss"])

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
        if is_mesh(self.accelerator):
            sync_buffers([self.module, *self.averages.values()])  # of which FSDP2 keeps those of any process
            gather_into(self.whole, self.trained)
        state = {
            "method": self.flags["method"],
            "replicas": self.accelerator.num_processes,
            "processes_per_replica": processes_per_replica(self.accelerator),
            "arguments": self.flags,
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "slots": self._slots(),
            "losses": self.tracker.state_dict(),
            "unreadable": slots_of_all(self.unreadable.slots if self.unreadable else []),
            "history": self.history,
        }
        save_checkpoint(self.accelerator, self.checkpoints / f"step_{self.step}", state, self.averages)
        if self.accelerator.is_main_process:
            kept = list(checkpoints_in(self.checkpoints))[-self.args.save_total_limit :]
            best = [self._best()["step"]] if self.history else []
            remove_checkpoints(self.checkpoints, keep=kept + best)
            self._publish(improved=not self.images and self.step in best)

    def end_epoch(self, row: Row) -> None:
        """Take an epoch's row into the history, save, and report it.

        Raises FloatingPointError, ahead of that, for a held-out loss that is not a finite number.
        """
        refuse_meaningless(row, self.step, "lr or rwp_gamma" if self.rwp else "lr")
        self.history.append(row)
        best = self._best()
        self.history = [kept if kept is row or kept is best else without_by_class(kept) for kept in self.history]
        self.images, self.seconds = 0, 0.0
        self.tracker.reset()
        figures = {name: value for name, value in row.items() if isinstance(value, float)}
        noise = row["rwp"]["relative_noise"] if "rwp" in row else {}
        sizes = {f"noise_size_{which}": layer["size"] for which, layer in noise.items()}
        self.accelerator.log(figures | sizes, step=self.step)
        self.save()
        if self.rwp and len(self.history) == 1:
            self.progress.say(f"noise / weights: {noise_sizes(row['rwp']) or 'none yet'}")
        self.progress.say(self.progress.line(epoch_figures(row)))

    def stop(self) -> None:
        """Exit with the status of the signal, after a save."""
        if self.background is not None:
            self.background.stop()
        self.progress.close()
        self.accelerator.print(self.signals.saved(self.step, self.folder), file=sys.stderr)
        self.accelerator.end_training()
        raise SystemExit(self.signals.status)

    def results(self) -> Results:
        """What results.json would hold now. The main process calls it by itself."""
        last = self.history[-1] if self.history else Row()
        results: Results = {
            "final": last if last.get("step") == self.step else {"step": self.step},
            "seconds": sum(row["seconds"] for row in self.history) + self.seconds,
            "weights_sha256": weights_digest(self.trained if self.whole is None else self.whole),
            "arguments": self.flags,
            **self.facts,  # type: ignore[typeddict-item]
            "history": self.history,
        }
        return with_by_class(results)

    def finish(self, recipe: str) -> None:
        """Write the model and the results, which are those of the last epoch, and print the last screen.

        recipe: the command of `hf-rwp` that this was.
        """
        if is_mesh(self.accelerator):
            gather_into(self.whole, self.trained)
        digests = gather_object([weights_digest(self.module)])
        if not self.accelerator.is_main_process:
            return
        results = self.results()
        results["replicas_sha256"] = sorted(set(digests))
        self.write_model(self.model_folder, results)
        write(self.results_file, as_json(results))
        logs = self.folder / "logs" if "tensorboard" in self.args.report_to else None
        waits = None if self.flags.get("push_to_hub") else self.flags.get("hub_model_id")
        where = {"logs": logs, "processes": self.accelerator.num_processes, "repo_id": waits}
        then = commands(self.folder, recipe, results, self.args.given.flags, **where)
        pictures = [self.folder / name for name in ("curves.png", "confusion.png")]
        written = [self.results_file, self.model_folder, *pictures, newest(self.checkpoints)]
        print(last_screen(results, [path for path in written if path and path.exists()], then))

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
        if self.whole is not None:
            load_weights(self.whole, checkpoint, "model" if self.trained is self.module else next(iter(self.averages)))
        else:
            parts = {"model": self.module, **self.averages}
            if is_engine(self.accelerator):
                load_weights(parts.pop("model"), checkpoint)
            for name, of in parts.items():  # accelerate saves what it has wrapped
                load_model(of, checkpoint / f"{name}.safetensors")
        results = self.results()
        results["final"], results["chosen"] = best, "best"
        self.write_model(self.best_folder, with_by_class(results))
        return self.best_folder

    def _slots(self) -> dict[str, int]:
        """Those of `rwp_report`; a row that was just written has them already."""
        if self.rwp is None:
            return self._slots_before
        last = self.history[-1] if self.history else Row()
        slots: dict[str, int] = (last["rwp"] if last.get("step") == self.step else self.rwp_report())["slots"]
        return slots

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
