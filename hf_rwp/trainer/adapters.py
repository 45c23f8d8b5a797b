"""A fine-tuned language model, evaluation by evaluation: what it has learned, what it forgot, and what comes next."""

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_rwp.runs.closing import beside, curves_beside, said_of_files, with_comments, wrapped
from hf_rwp.runs.given import OF_A_SESSION, Flags, join_flags
from hf_rwp.runs.progress import Progress, nothing_left
from hf_rwp.runs.records import aligned, scrub_paths
from hf_rwp.runs.run import agree
from hf_rwp.runs.signals import Signals
from hf_rwp.trainer.language import exact_match, mean_loss

_PLACES = {"base_dir", "output_dir", "records", "report_to", "push_to_hub", *OF_A_SESSION}  # not what a run is
_SUFFERS = 0.1  # nats a token: what was right is a tenth less likely


@dataclass
class Measured:
    """What is measured beside the loss. rows: held-out prompts and completions. known: text that the base knew."""

    rows: Sequence[Mapping[str, str]]
    known: Sequence[str]
    max_new_tokens: int

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
        found = {}
        if self.rows:
            found["accuracy"] = exact_match(model, tokenizer, self.rows, max_new_tokens=self.max_new_tokens)
        if self.known:
            found["known_loss"] = mean_loss(model, tokenizer, self.known)
        return found


class History(TrainerCallback):
    """A row of figures for every evaluation, and how far training is. before: of the base, without adapters.

    These, seconds and what RWP did are in Trainer's log, which checkpoints hold: a run that goes on has all of them.
    After a signal all replicas save a checkpoint and exit with the signal's status.
    """

    def __init__(self, measure: Measured, tokenizer: Any, trainer: Any, signals: Signals) -> None:
        self.measure, self.tokenizer, self.rows = measure, tokenizer, list[dict[str, Any]]()
        self.before: dict[str, float] = {}
        self.report: dict[str, Any] = {}  # RWP's, before this session, as seconds
        self.seconds = 0.0
        self._begun, self._trainer, self._signals = time.perf_counter(), trainer, signals
        self._stops = False  # agreed
        self._progress = Progress(1, shown=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **seen: Any) -> None:
        for entry in state.log_history:
            if "row" in entry:
                self.rows.append(entry["row"])
            if "before" in entry:  # those of `_note`
                self.report, self.before, self.seconds = entry.get("rwp", {}), entry["before"], entry["seconds"]
        if args.use_peft or not state.global_step:
            with seen["model"].disable_adapter() if args.use_peft else contextlib.nullcontext():
                self.before = self.measure(seen["model"], self.tokenizer)
        samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        part = max(1, round(state.max_steps / max(1, state.num_train_epochs)))
        counts = {"part": part, "done": state.global_step, "images": samples, "unit": "samples"}
        self._progress = Progress(state.max_steps, **counts, shown=state.is_world_process_zero)
        if state.global_step >= state.max_steps:
            self._progress.say(nothing_left(f"{state.max_steps:,} steps", "--num_train_epochs"))
        self._progress.begin("training")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress.advance()
        asked, accelerator = self._signals.seen is not None, self._trainer.accelerator
        alone = accelerator.num_processes == 1
        if control.should_save or (asked and alone) or state.global_step % (int(state.logging_steps) or 1) == 0:
            self._stops = agree(accelerator, [], 0, asked)[0]
        if self._stops:  # evaluation may take longer than there is time
            control.should_save, control.should_evaluate = True, False
        self._note(state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._stops:
            self._trainer.accelerator.wait_for_everyone()  # a launcher ends the others with the first
            self._trainer.callback_handler.on_train_end(args, state, control)  # whoever writes logs or shows them ends
            self._trainer.accelerator.print(self._signals.saved(state.global_step, args.output_dir), file=sys.stderr)
            raise SystemExit(self._signals.status)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._note(state, control)

    def total(self) -> tuple[dict[str, Any], float]:
        """RWP's report, empty without it, and seconds, of all sessions. Collective."""
        report = {} if self._trainer.rwp is None else self._trainer.rwp.report()
        if report and self.report:
            before = self.report["slots"]
            report["slots"] = {kind: count + before[kind] for kind, count in report["slots"].items()}
            report["relative_noise"] = report["relative_noise"] or self.report["relative_noise"]  # no pass ran since
        return report, self.seconds + time.perf_counter() - self._begun

    def _note(self, state: Any, control: Any) -> None:
        if control.should_save:
            report, seconds = self.total()
            entry = {"step": state.global_step, "before": self.before, "seconds": seconds}
            state.log_history.append(entry | ({"rwp": report} if report else {}))

    def on_log(self, args: Any, state: Any, control: Any, **seen: Any) -> None:
        logs = seen["logs"]
        if "loss" in logs:
            self._progress.note(**{name: logs[name] for name in ("loss", "loss_gap") if name in logs})

    def on_evaluate(self, args: Any, state: Any, control: Any, **seen: Any) -> None:
        logs = [entry for entry in state.log_history if "loss" in entry]
        losses = logs[-1] if logs else {}
        row = {"epoch": state.epoch or 0.0, "step": state.global_step, "eval_loss": seen["metrics"]["eval_loss"]}
        row |= {"train_loss": losses["loss"]} if losses else {}
        row |= {name: losses[name] for name in ("loss_clean", "loss_perturbed", "loss_gap") if name in losses}
        row |= self.measure(seen["model"], self.tokenizer)
        self.rows.append(row)
        state.log_history.append({"step": state.global_step, "row": row})
        told = {
            "eval_loss": "held-out loss {:.4f}",
            "accuracy": "exact match {:.2%}",
            "known_loss": "known text {:.4f}",
        }
        figures = ", ".join(text.format(row[name]) for name, text in told.items() if name in row)
        self._progress.say(f"step {row['step']:,}/{state.max_steps:,}: {figures}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress.close()


def command_of_run(given: Flags) -> str:
    """The command line that gives the same run, without the places that it read and wrote."""
    kept = {n: v for n, v in given.items() if n not in _PLACES and not n.startswith("hub_")}
    return shlex.join(["accelerate", "launch", "recipes/lora_rwp.py", *scrub_paths(join_flags(kept))])


def last_screen(
    results: Mapping[str, Any], given: Flags, folder: Path, base: str, prompt: str | None, written: Sequence[Path]
) -> str:
    """Its figures, what they say, what was written, and the commands to generate, compare and push.

    folder: what PEFT or transformers loads, with its tokenizer. base: the model under the adapters. prompt: of one of
    the held-out samples.
    """
    final = results["final"]
    rows = {"held-out loss": f"{final['eval_loss']:.4f}"}
    if "accuracy" in final:
        rows["exact match"] = f"{final['accuracy']:.2%}"
    if "forgetting" in final:
        rows["known text"] = f"loss {final['known_loss']:.4f}, {final['known_loss_before']:.4f} before"
    rows |= {"peak memory": f"{final['peak_memory_bytes'] / 2**20:,.0f} MiB", "seconds": f"{results['seconds']:.1f}"}
    parts = [aligned(rows), "\n".join(map(wrapped, in_words(results).splitlines())), said_of_files(written)]
    return "\n\n".join([*parts, with_comments(next_commands(results, given, folder, base, prompt))])


def in_words(results: Mapping[str, Any]) -> str:
    """What RWP did, and what was forgotten, for someone who does not know the terms."""
    final, said = results["final"], ["Plain training: no weight was perturbed."]
    if "rwp" in final:
        slots, largest = final["rwp"]["slots"], final["rwp"]["relative_noise"].get("largest")
        count = slots["clean"] + slots["perturbed"]
        said = [f"RWP took {slots['perturbed']:,} of {count:,} gradients with noise in the weights."]
        if largest:
            size = f"{100 * largest['size']:.2g} %"
            said.append(f"The noise was {size} of the weights in the largest layer ({largest['name']}).")
    if "forgetting" in final:
        more = final["forgetting"]
        what = "what it knew has suffered" if more > _SUFFERS else "little" if more > 0 else "nothing"
        what = what if more > _SUFFERS else f"{what} is forgotten"
        which = "more" if more > 0 else "less"
        said.append(f"Text that the base knew costs {abs(more):.2f} nats a token {which} than before: {what}.")
    return "\n".join(said)


def next_commands(
    results: Mapping[str, Any], given: Flags, folder: Path, base: str, prompt: str | None
) -> dict[str, str]:
    """By what it is for; see `last_screen`."""
    code = [
        "",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"folder = {_quoted(str(folder))}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = AutoModelForCausalLM.from_pretrained({_quoted(base) if results['adapters'] else 'folder'})",
    ]
    if results["adapters"]:
        code.insert(1, "from peft import PeftModel")
        code.append("model = PeftModel.from_pretrained(model, folder)")
    code += [
        f'prompt = tokenizer({_quoted(prompt or "Hello")}, return_tensors="pt").input_ids',
        f"answer = model.generate(prompt, max_new_tokens={results['max_new_tokens']})",
        "print(tokenizer.decode(answer[0]))",
    ]
    own = {n: v for n, v in given.items() if n not in OF_A_SESSION | {"rwp", "records"} and not n.startswith("rwp_")}
    method = results["arguments"]["method"]
    other = "true" if method == "base" else "false"
    return {
        "generate": shlex.join(["python", "-c", "\n".join(code)]),
        **curves_beside(folder.parent, beside(folder.parent, method)),
        "compare": shlex.join(["hf-rwp", "lora", f"--rwp={other}", *join_flags(own)]),
        "push": shlex.join(["hf-rwp", "push", str(folder), "USER/NAME"]),
    }


def _quoted(text: str) -> str:
    """In Python, where JSON's escape of an emoji would be two characters."""
    return json.dumps(text, ensure_ascii=False)
