"""What a Trainer shows while it trains: `hf_rwp.runs.progress` in place of its own bar and of its printed logs."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from hf_rwp.runs.progress import PARTS, Progress, epoch_figures, nothing_left
from hf_rwp.runs.records import Row


def watch(trainer: Any) -> None:
    """Have `trainer` show one bar for all of training on a terminal, and lines elsewhere.

    `disable_tqdm` says which. Losses are those of `take_losses`, where the trainer has it; else what it logs.
    """
    disable_progress_bar()  # of each file that transformers writes
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch(trainer))


class Watch(TrainerCallback):
    """The figures of an epoch are shown once it is evaluated, or with whatever comes next where it is not."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.progress: Progress | None = None
        self.losses: list[tuple[float, int]] = []  # means of this epoch's steps, and of how many
        self.ended: Row | None = None  # an epoch whose figures are not shown yet

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        part = max(1, round(state.max_steps / state.num_train_epochs))
        options: dict[str, Any] = {"images": per_step, "bar": not args.disable_tqdm, "unit": self.unit}
        options["shown"] = state.is_world_process_zero
        self.progress = Progress(state.max_steps, part=part, done=state.global_step, **options)
        if state.global_step >= state.max_steps:
            self.progress.say(nothing_left(f"{state.max_steps:,} steps", "--num_train_epochs"))

    @property
    def unit(self) -> str:
        return "images" if hasattr(self.trainer, "take_losses") else "samples"

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.progress is None:
            return
        self._tell()
        self.losses = []
        self.progress.begin(f"epoch {int(round(state.epoch or 0, 6)) + 1}/{state.num_train_epochs}")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.progress is None:
            return
        if state.global_step % max(1, self.progress.part // PARTS) == 0:
            self._take_losses()
        self.progress.advance(state.global_step - self.progress.done)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **seen: Any) -> None:
        loss = seen["logs"].get("loss")
        if self.progress is not None and isinstance(loss, float) and not hasattr(self.trainer, "take_losses"):
            self.losses = [(loss, 1)]
            self.progress.note(loss=loss)
            if self.ended is not None:
                self.ended["train_loss"] = loss

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.progress is None:
            return
        self._take_losses()
        self.ended = Row(images_per_second=self.progress.speed())
        steps = sum(count for _, count in self.losses)
        if steps:
            self.ended["train_loss"] = sum(mean * count for mean, count in self.losses) / steps

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **seen: Any) -> None:
        if self.progress is None:
            return
        figures: Any = {name: seen["metrics"].get(f"eval_{name}") for name in ("top1", "loss")}
        row = Row(top1=figures["top1"], eval_loss=figures["loss"])
        if self.ended is not None:
            self.ended |= row
            self._tell()
        else:
            label, self.progress.label = self.progress.label, f"evaluation at step {state.global_step:,}"
            self.progress.say(self.progress.line(epoch_figures(row)))
            self.progress.label = label

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.progress is not None:
            self._tell()
            self.progress.close()
            self.progress = None

    def _take_losses(self) -> None:
        mean, count = self.trainer.take_losses() if hasattr(self.trainer, "take_losses") else (0.0, 0)
        if count and self.progress is not None:
            self.losses.append((mean, count))
            self.progress.note(loss=mean)

    def _tell(self) -> None:
        """Show the epoch that has ended."""
        if self.ended is not None and self.progress is not None:
            self.progress.say(self.progress.line(epoch_figures(self.ended, self.unit)))
        self.ended = None
