"""What a run of `ImageTrainer` did, epoch by epoch: what Trainer does not note, and its log as rows of figures."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_rwp.runs.divergence import refuse_divergence, refuse_meaningless
from hf_rwp.runs.records import Row
from hf_rwp.runs.run import agree, slots_of_all
from hf_rwp.runs.signals import Signals

if TYPE_CHECKING:
    from hf_rwp.trainer.images import ImageTrainer


class Record(TrainerCallback):
    """Keeps what Trainer does not, in its own log, which checkpoints hold: what RWP did, seconds, unreadable images.

    After a signal it has all replicas save a checkpoint and exit with the signal's status. Raises on all at once,
    ValueError for too many unreadable images, FloatingPointError for a loss, held-out too, that is not a finite number.
    """

    def __init__(self, trainer: "ImageTrainer", signals: Signals) -> None:
        self.trainer = trainer
        self.signals = signals
        self.stops = False  # agreed
        self.slots = {"clean": 0, "perturbed": 0}  # before this session
        self.seconds = 0.0  # of this epoch, before this session
        self.started = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        log: Any = state.log_history  # of the checkpoint that training goes on from
        for entry in log:
            if "seconds" in entry:
                self.slots = entry.get("rwp", {}).get("slots", self.slots)
                self.seconds = 0.0 if entry["whole"] else entry["seconds"]
                seen: Any = self.trainer.train_dataset
                seen.unreadable.restore(entry.get("unreadable_slots", []))

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.perf_counter() - self.seconds
        self.seconds = 0.0
        if self.trainer.rows is not None:  # Trainer does not reach it on several replicas, in the epoch that it resumes
            self.trainer.rows.set_epoch(math.floor(round(state.epoch or 0, 6)))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        asked, alone = self.signals.seen is not None, self.trainer.accelerator.num_processes == 1
        if control.should_save or (asked and alone) or state.global_step % (state.logging_steps or 1) == 0:
            self.stops = self.agree(self.trainer.train_dataset, asked)[0]
        if self.stops:  # evaluation may take longer than there is time
            control.should_save, control.should_evaluate = True, False
        if control.should_save:
            control.should_log = True  # a checkpoint holds what was logged, not the losses since then
            self.note(state, whole=state.epoch == round(state.epoch or 0))

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.stops:
            return
        accelerator = self.trainer.accelerator
        accelerator.wait_for_everyone()  # a launcher ends the others with the first
        self.trainer.callback_handler.on_train_end(args, state, control)  # whoever writes logs or shows them ends that
        accelerator.print(self.signals.saved(state.global_step, args.output_dir), file=sys.stderr)
        raise SystemExit(self.signals.status)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        noted: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "seconds" in entry), {})
        if (noted.get("step"), noted.get("whole")) != (state.global_step, True):  # a save may have come first
            self.note(state, whole=True)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **seen: Any) -> None:
        count = self.agree(self.trainer.eval_dataset)[1]
        if count:
            state.log_history[-1]["eval_unreadable_images"] = count
        refuse_meaningless(seen["metrics"], None if args.eval_only else state.global_step, _advice(args))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **seen: Any) -> None:
        logs = seen["logs"]
        losses = {name: value for name, value in logs.items() if name in ("loss", "loss_clean", "loss_perturbed")}
        if not args.logging_nan_inf_filter:
            refuse_divergence(losses, state.global_step, _advice(args))

    def note(self, state: TrainerState, whole: bool) -> None:
        """Add an entry to Trainer's log. whole: whether it is of a whole epoch. Collective."""
        entry: dict[str, Any] = {"epoch": state.epoch, "step": state.global_step, "whole": whole}
        entry |= {"seconds": time.perf_counter() - self.started}
        images: Any = self.trainer.train_dataset
        entry["unreadable_images"] = self.agree(images)[1]
        if entry["unreadable_images"]:
            entry["unreadable_slots"] = slots_of_all(images.unreadable.slots)
        if self.trainer.rwp is not None:
            report = self.trainer.rwp.report()
            slots = {kind: self.slots[kind] + count for kind, count in report["slots"].items()}
            entry["rwp"] = {**report, "slots": slots, "gamma": self.trainer.rwp.defaults["rwp_gamma"]}
            self.trainer.noise = report["relative_noise"]
        state.log_history.append(entry)

    def agree(self, images: Any, stop: bool = False) -> tuple[bool, int]:
        """Whether any replica must stop, and how many images of an `ImageDataset` none could read. Collective."""
        return agree(self.trainer.accelerator, images.unreadable.slots, self.trainer.args.max_bad_images, stop)


def _advice(args: Any) -> str:
    return "learning_rate or rwp_gamma" if args.rwp else "learning_rate"


def rows_by_epoch(log_history: Sequence[Mapping[str, Any]], images: int) -> list[Row]:
    """One row an epoch: mean losses over its logs, its last evaluation, and what `Record` noted at its end.

    A log counts for the epoch that it was made in. images: of the training set.
    """
    rows: dict[int, dict[str, Any]] = {}
    logged: dict[int, list[tuple[int, Mapping[str, float]]]] = {}
    last_step = 0
    for entry in log_history:
        number = math.ceil(round(entry["epoch"], 6))
        row = rows.setdefault(number, {})
        if "seconds" in entry:
            if entry["whole"]:
                epoch = round(entry["epoch"], 6)
                row |= {name: value for name, value in entry.items() if name not in ("whole", "unreadable_slots")}
                row["epoch"] = epoch
        elif {"loss", "learning_rate"} <= entry.keys():
            logged.setdefault(number, []).append((entry["step"] - last_step, entry))
            last_step, row["learning_rate"] = entry["step"], entry["learning_rate"]
        else:
            row |= evaluated(entry)
    for number, parts in logged.items():
        for name in ("loss", "loss_clean", "loss_perturbed", "loss_gap"):
            known = [(steps, entry[name]) for steps, entry in parts if name in entry]
            if known:
                mean = sum(steps * value for steps, value in known) / sum(steps for steps, _ in known)
                rows[number]["train_loss" if name == "loss" else name] = mean
    whole: list[Any] = [row for row in rows.values() if "seconds" in row]
    for row, begin in zip(whole, [0.0, *(row["epoch"] for row in whole)], strict=False):
        row["images_per_second"] = (row["epoch"] - begin) * images / row["seconds"]
    return whole


def evaluated(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Of Trainer's evaluation: top1, top5, eval_loss and, where there are any, unreadable_eval_images and by_class."""
    names = {"eval_top1": "top1", "eval_top5": "top5", "eval_loss": "eval_loss", "eval_by_class": "by_class"}
    names["eval_unreadable_images"] = "unreadable_eval_images"
    return {name: figures[key] for key, name in names.items() if key in figures}
