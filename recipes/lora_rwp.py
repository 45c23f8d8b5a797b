"""Fine-tune a language model with LoRA and Random Weight Perturbation (RWP) on the base weights: TRL's SFTTrainer.

# A small language model that is made on the spot, and sums in words: no network, minutes on a laptop
```bash
accelerate launch recipes/lora_rwp.py
accelerate launch recipes/lora_rwp.py --rwp false                  # to compare: plain LoRA
```

# Your model and data: an id on the Hub, a file of `messages`, `prompt` and `completion`, or `text`
```bash
accelerate launch recipes/lora_rwp.py --model_name_or_path meta-llama/Llama-3.2-1B --dataset trl-lib/Capybara \
    --lora_r 16 --bf16 --gradient_checkpointing
accelerate launch recipes/lora_rwp.py --model_name_or_path path/to/model --data_file sums.jsonl --known_file known.txt
```

# Seven billion weights on one GPU, quantized (pip install bitsandbytes); or on eight that hold them together
```bash
accelerate launch recipes/lora_rwp.py --config recipes/configs/lora/qlora_7b.yaml --data_file sums.jsonl
accelerate launch --config_file recipes/accelerate/fsdp2_8.yaml --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
    --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer recipes/lora_rwp.py \
    --config recipes/configs/lora/fsdp2_7b.yaml --data_file sums.jsonl
```

The flags are those of TRL (SFTConfig, ModelConfig, so PEFT's `--use_dora`, `--lora_target_modules`, ...) and of RWP;
all can stand in a file, `--config FILE.yaml`. It ends with the held-out loss, the fraction of prompts that are
completed exactly, the loss on text that the base knew before and after (forgetting), the peak memory, a picture and,
in `adapter`, what PEFT loads, with its card.
"""

import json
import os
import resource
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_rwp.cli import refuse_missing

refuse_missing("lora", __name__)
from hf_rwp.images.weights import find_weights
from hf_rwp.runs.parsing import flags_first, start, values_first
from hf_rwp.trainer.ranges import Ranges, check_ranges
from hf_rwp.trainer.texts import TextArguments, load_texts


@dataclass
class Ahead(TextArguments, Ranges):
    """What is checked ahead of the slow imports."""

    model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        TextArguments.__post_init__(self)
        Ranges.__post_init__(self)

    def look_ahead(self) -> None:
        named = self.model_name_or_path
        if named and not Path(named).expanduser().exists():
            find_weights(named, "model_name_or_path")  # which refuses what cannot be on the Hub


values_first(__name__, Ahead)
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)  # TRL's name for it
import torch
from trl import ModelConfig, SFTConfig

from hf_rwp import RWPArguments
from hf_rwp.core.checks import check_all
from hf_rwp.runs.folders import unfinished
from hf_rwp.runs.given import Given, save_flags


@dataclass
class Arguments(TextArguments, ModelConfig, RWPArguments, SFTConfig):
    given = Given()  # no flag: those that were typed, as `parse_arguments` notes them
    numbered = False  # no flag: whether output_dir is the first of a row of folders, `settle_folder`
    # Model
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "An id on the Hub or a folder; a small language model made here if not set."}
    )
    base_dir: str = field(
        default="outputs/small_language_model",
        metadata={"help": "Where that small language model is kept for other runs."},
    )
    base_steps: int = field(default=1500, metadata={"help": "Steps of 64 texts that it is trained for."})
    use_peft: bool = field(default=True, metadata={"help": "Whether to train adapters; all weights with `false`."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "The layers that get adapters."}
    )
    max_new_tokens: int = field(default=16, metadata={"help": "Of an answer that is compared with the held-out one."})
    quick: bool = field(default=False, metadata={"help": "Whether to be done in seconds, with a base of few steps."})
    # RWP and training, with other defaults
    rwp: bool = field(default=True, metadata={"help": "`--rwp false` is plain SFTTrainer."})
    rwp_frozen: bool = field(default=True, metadata={"help": "Whether the base weights are perturbed, too."})
    rwp_noise: str = field(
        default="filter_normalized", metadata={"help": "What the noise is relative to: every weight matrix's rms."}
    )
    rwp_gamma: float | None = field(default=0.05, metadata={"help": "Size of the noise, relative to the weights."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate; 2e-4, and for the embedded base 1e-3, if not set."}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Passes over the training samples; 3, and of the sums 10, if not set."}
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Samples per replica and micro-step; a single replica halves them for RWP."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Samples per replica in evaluation."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Whether to pin the samples' memory, for a GPU."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Whether to save memory by recomputing activations."}
    )
    bf16: bool | None = field(
        default=torch.cuda.is_available(), metadata={"help": "Whether to compute in bfloat16, on a GPU by default."}
    )
    max_length: int | None = field(default=512, metadata={"help": "Tokens to a sample."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log the losses: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "How many of the last checkpoints are kept."})
    seed: int = field(default=0, metadata={"help": "Seed of adapters, shuffling and the sums, at least 0."})
    report_to: list[str] | str | None = field(
        default_factory=lambda: ["none"], metadata={"help": "Where figures go: tensorboard, wandb, ..., or none."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for all that is written. If not set, a new one for each run: "
            "outputs/DATA_lora_METHOD_seedN, then .../2, .../3."
        },
    )
    records: str | None = field(
        default=None, metadata={"help": "A file of records, .jsonl, that the run's figures are appended to as a line."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether a run that output_dir holds may be deleted for this one."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A run's folder, for its last checkpoint, one of its checkpoints, or `latest` for the last one in "
            "output_dir; with the flags that the run was given, and those given now."
        },
    )
    disable_tqdm: bool | None = field(
        default=None, metadata={"help": "Whether to hide progress bars; shown only on a terminal if not set."}
    )
    eval_only: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.quick:
            self.base_steps, self.num_train_epochs = min(self.base_steps, 20), 1.0
            self.held_out = 16 if self.held_out is None else self.held_out
            self.train_samples = 64 if self.train_samples is None else self.train_samples
        if self.learning_rate is None:
            self.learning_rate = 2e-4 if self.model_name_or_path else 1e-3
        if self.num_train_epochs is None:
            self.num_train_epochs = 10.0 if self.embedded else 3.0
        if self.output_dir is None:
            self.output_dir, self.numbered = f"outputs/{self.data_name}_lora_{self.method}_seed{self.seed}", True
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        check_ranges(self)  # type: ignore[arg-type]
        check_all(self, ("base_steps", self.base_steps >= 1, "at least 1"))
        if self.model_name_or_path is None and (self.load_in_4bit or self.load_in_8bit):
            raise ValueError("load_in_4bit and load_in_8bit are for a model that is given: set model_name_or_path")
        TextArguments.__post_init__(self)
        ModelConfig.__post_init__(self)
        RWPArguments.__post_init__(self)  # and SFTConfig's

    def kept(self) -> str | None:
        """What a run that is stopped has kept, and how to go on; None for nothing."""
        folder = Path(self.output_dir)
        return f"--resume_from_checkpoint {shlex.quote(str(folder))} goes on" if unfinished(folder) else None

    @property
    def method(self) -> str:
        return "rwp" if self.rwp else "base"

    @property
    def arm(self) -> str:
        """What of the model is perturbed: nothing (plain), the adapters, or the frozen base as well."""
        return "plain" if not self.rwp else "frozen" if self.rwp_frozen else "adapters"

    @property
    def data_name(self) -> str:
        return Path(self.data_file or self.dataset or "sums").stem


flags_first("lora", __name__, Arguments, __doc__, light=False)  # ahead of the slow imports
from datasets import Dataset
from datasets import disable_progress_bars as hide_bars_of_datasets
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.utils.logging import disable_progress_bar as hide_bars_of_transformers
from trl import SFTTrainer, get_peft_config, get_quantization_config

from hf_rwp import RWPTrainerMixin
from hf_rwp.analysis.run_plots import title_of, training_curves
from hf_rwp.core.refusals import refuse_lone_processes
from hf_rwp.hub.card import add_card
from hf_rwp.hub.export import class_name
from hf_rwp.hub.push import PushError, push
from hf_rwp.runs.files import write
from hf_rwp.runs.records import append_record, environment, hub_id, scrub_paths
from hf_rwp.runs.resuming import RESULTS, check_writable, name_of, settle_folder
from hf_rwp.runs.screen import fitted
from hf_rwp.runs.signals import Signals
from hf_rwp.trainer.adapters import History, Measured, command_of_run, last_screen
from hf_rwp.trainer.checkpoints import find_trainer_checkpoint, remove_later_checkpoints
from hf_rwp.trainer.language import known_texts, make_base


class RWPSFTTrainer(RWPTrainerMixin, SFTTrainer): ...


def main(args: Arguments) -> None:
    refuse_lone_processes()
    given = vars(args).pop("given", args.given)  # which Trainer need not pickle
    if args.push_to_hub and args.hub_model_id is None and (args.numbered or given.run):
        args.hub_model_id = name_of(Path(args.output_dir))
    settle_folder(args)
    output_dir, flags = Path(args.output_dir), scrub_paths(args.to_dict())
    checkpoint = find_trainer_checkpoint(args)
    check_writable(output_dir)
    set_seed(args.seed)
    if args.disable_tqdm:
        hide_bars_of_datasets()
        hide_bars_of_transformers()
    trainer = create_trainer(args)
    tokenizer, is_main = trainer.processing_class, trainer.is_world_process_zero()
    measure = measured(args, trainer.held_out)
    history = History(measure, tokenizer, trainer, signals := Signals())
    trainer.add_callback(history)
    for shows in (PrinterCallback, ProgressCallback):  # History does
        trainer.remove_callback(shows)
    if is_main:
        begins = [f"weights: from {checkpoint.name}"] if checkpoint else []
        print(fitted("\n".join([*given.lines(), *begins, f"writes to: {output_dir}"])), flush=True)
        save_flags(output_dir, given.flags)
        remove_later_checkpoints(output_dir, checkpoint)
        write(output_dir / "arguments.json", json.dumps(flags, indent=2, default=str))
    busy = time.process_time()
    with signals:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    (done, seconds), memory = history.total(), peak_memory()
    busy = time.process_time() - busy
    if not history.rows or history.rows[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    final = dict(history.rows[-1])
    if trainer.rwp is not None:
        final["rwp"] = {**done, "gamma": trainer.rwp.defaults["rwp_gamma"]}
    final |= {f"{name}_before": value for name, value in history.before.items()}
    if "known_loss_before" in final:
        final["forgetting"] = final["known_loss"] - final["known_loss_before"]
    adapter = output_dir / ("adapter" if args.use_peft else "model")
    state = trainer.accelerator.get_state_dict(trainer.model)  # collective under FSDP2
    if not is_main:
        return
    trained = trainer.accelerator.unwrap_model(trainer.model)
    trained.save_pretrained(adapter, state_dict=state)
    tokenizer.save_pretrained(adapter)
    results = {
        "final": final | {"peak_memory_bytes": memory},
        "seconds": seconds,
        "cpu_seconds": busy,
        "command": command_of_run(given.flags),
        "adapters": args.use_peft,
        "max_new_tokens": args.max_new_tokens,
        "arguments": {name: value for name, value in flags.items() if value != -1} | {"method": args.method},
        "base_model": hub_id(args.model_name_or_path),
        "data": {
            "train": {"samples": len(trainer.train_dataset)},
            "validation": {"samples": len(trainer.held_out)},
        },
        **environment(trainer.accelerator),
        "history": history.rows,
    }
    results["versions"] |= {name: version(name) for name in ("trl", "peft")}
    finish(args, results, adapter, class_name(trained.get_base_model() if args.use_peft else trained))
    if args.records:
        own = {"arm": args.arm, "seed": args.seed, "load_average": os.getloadavg()[0]}
        append_record(Path(args.records), own | {name: value for name, value in results.items() if name != "arguments"})
    base = trainer.model.get_base_model().name_or_path if args.use_peft else ""
    prompt = min((row["prompt"] for row in trainer.held_out if isinstance(row.get("prompt"), str)), key=len, default="")
    written = [output_dir / RESULTS, output_dir / "curves.png", adapter]
    print(last_screen(results, given.flags, adapter, base, prompt, written))
    if args.push_to_hub:
        try:
            print(f"Pushed to {push(adapter, trainer.hub_model_id, private=args.hub_private_repo)}")
        except PushError as error:
            raise SystemExit(f"error: {error}") from None


def create_trainer(args: Arguments) -> Any:
    """What trains: for another loss or other data, change it here."""
    train, held_out = load_texts(args, args.seed)
    path = args.model_name_or_path
    if path is None:
        path = str(made_once(args))
    args.model_init_kwargs = {
        "revision": args.model_revision,
        "attn_implementation": args.attn_implementation,
        "dtype": args.dtype,
        **(args.model_init_kwargs or {}),
    }
    try:
        trainer: Any = RWPSFTTrainer(
            model=path,
            args=args,
            train_dataset=Dataset.from_list(train),
            eval_dataset=Dataset.from_list(held_out),
            quantization_config=get_quantization_config(args),
            peft_config=get_peft_config(args),
        )
    except ValueError as error:
        if "chat_template is not set" not in str(error):
            raise
        raise ValueError(
            f"{path} has no chat template, which `messages` need: set --chat_template_path to a model that has one or "
            "to a file, take an -Instruct model, or give `prompt` and `completion`"
        ) from error
    trainer.held_out = held_out
    return trainer


def made_once(args: Arguments) -> Path:
    """The embedded base, which the main process makes where it is not there yet."""
    folder = Path(f"{args.base_dir}_{args.base_steps}")
    with args.main_process_first(desc="the small language model"):
        return make_base(folder, args.base_steps, seed=0)


def measured(args: Arguments, held_out: Sequence[Mapping[str, Any]]) -> Measured:
    """What is measured beside the loss; the answers only where there are prompts in plain text."""
    plain = [row for row in held_out if isinstance(row.get("prompt"), str)]
    known: list[str] = []
    if args.known_file:
        text = Path(args.known_file).expanduser().read_text(encoding="utf-8")
        known = [line for line in text.splitlines() if line.strip()]
    elif args.model_name_or_path is None:
        known = known_texts(len(held_out), seed=10_000)
    return Measured(plain, known, args.max_new_tokens)


def peak_memory() -> int:
    """Bytes: of torch's allocator on a GPU, of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def finish(args: Arguments, results: dict[str, Any], adapter: Path, architecture: str) -> None:
    """Write the results, the picture and the card. architecture: the base model's class."""
    output_dir, final = adapter.parent, results["final"]
    config = adapter / "adapter_config.json"
    if config.is_file() and Path(args.model_name_or_path or "/").is_absolute():
        write(config, json.dumps(scrub_paths(json.loads(config.read_text())), indent=2))
    curves = output_dir / "curves.png"
    rows = [row | ({"top1": row["accuracy"]} if "accuracy" in row else {}) for row in results["history"]]
    training_curves(rows, curves, title_of(results), "Held-out prompts completed exactly (%)")
    write(output_dir / RESULTS, json.dumps(results, indent=2, default=str))
    memory, told = f"{final['peak_memory_bytes'] / 2**20:,.0f} MiB", []
    if "accuracy" in final:
        told.append("Accuracy is the share of held-out prompts that greedy decoding completes exactly.")
    if "forgetting" in final:
        told.append(
            f"The loss on text that the base knew went from {final['known_loss_before']:.4f} to "
            f"{final['known_loss']:.4f}."
        )
    if args.model_name_or_path is None:
        told.append("The base is a small language model that the recipe makes: `recipes/lora_rwp.py`.")
    add_card(
        adapter,
        results,
        pictures=[curves],
        repo_id=args.hub_model_id,
        library="peft" if args.use_peft else "transformers",
        architecture=architecture,
        evaluated_on="held out of the training samples",
        task="text-generation",
        name=f"{args.data_name}_lora_{args.method}" if args.hub_model_id is None else None,
        data="sums in words, generated" if args.embedded else args.data_name,
        dataset=args.dataset,
        note=" ".join([*told, f"Training took {memory} at its peak."]),
    )


if __name__ == "__main__":
    start(main, Arguments, __doc__)
