"""Compare RWP with plain training and with SAM, in one run and under equal terms, on small images.

# All methods on the embedded digits
```bash
python recipes/compare.py
```

# Plain training and RWP on images of your own, three times
```bash
python recipes/compare.py --data_dir path/to/images --methods base rwp --seeds 0 1 2
```

# CIFAR-10, the settings chosen for each method on a validation split
```bash
python recipes/compare.py --config recipes/configs/compare/cifar10_resnet18.yaml --dataset uoft-cs/cifar10 \
    --methods base sam rwp --seeds 0 1 2 --search true
```

The terms are one of three protocols:

1. `images`: every method sees the same images in the same number of steps. SAM computes two gradients of each (2x),
   plain training and RWP one (1x); on one replica RWP's come from the halves of a batch, with BatchNorm's statistics.
2. `gradients`: every method computes as many gradients of an image, 2 * epochs for each. RWP takes two batches a step,
   as in the reference code; plain training lasts twice as long.
3. `time`: every method trains as many steps as fit into the time that plain training takes for `--epochs`, by step
   times that are measured before, all methods in turn.

Every run is a whole schedule; with `--pretrain_epochs` it begins from weights that were trained plainly. With
`--search true` each method first tries one grid of the same size on images held out from the training split: all pairs
of `--lrs` and `--weight_decays`, with `--strengths` (factors on the method's rho or gamma) spread over them as in a
Latin square. Where `--rwp_gamma` is not given they are factors on what `hf_rwp.find_gamma` proposes after 200 plain
steps, which the records have as `middle`. Accuracy is that of the last epoch, on images that chose nothing; with
`--early_stopping` also that of the evaluation that held-out images choose.

Runs and trials become lines of `--results`; those that are there are not run again, and one that was cut goes on from
its last checkpoint. Images are decoded once and lie on the device, where they are augmented in batches.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hf_rwp.cli import refuse_missing

refuse_missing("compare", __name__)
from hf_rwp.core.checks import check_all
from hf_rwp.experiments.arguments import PAIRS, SmallArguments
from hf_rwp.runs.methods import METHODS, PROTOCOLS, ComparisonArguments, Settings, count_steps, relative_times
from hf_rwp.runs.parsing import flags_first, start

RECIPE = Path(__file__)


@dataclass
class Arguments(ComparisonArguments, SmallArguments):
    name: str | None = field(default=None, metadata={"help": "Of the comparison; the data's name if not set."})
    results: str | None = field(
        default=None, metadata={"help": "File of records; recipes/results/compare/NAME.jsonl if not set."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for checkpoints and the picture; outputs/compare_NAME if not set."}
    )

    pretrain_epochs: int = field(
        default=0, metadata={"help": "Epochs of plain training ahead, from which all methods of a seed begin."}
    )
    pretrain_lr: float = field(default=0.1, metadata={"help": "Their peak learning rate."})
    pretrain_weight_decay: float = field(default=5e-4, metadata={"help": "Their weight decay."})

    def __post_init__(self) -> None:
        for kind in (ComparisonArguments, SmallArguments):
            kind.__post_init__(self)
        self.name = self.name or Path(self.data_dir or self.dataset or "digits").name
        self.results = self.results or str(RECIPE.parent / "results" / "compare" / f"{self.name}.jsonl")
        self.output_dir = self.output_dir or f"outputs/compare_{self.name}"
        pairs = "rwp_antithetic" in self.methods
        check_all(
            self,
            ("batch_size", not pairs or self.batch_size % 4 == 0, PAIRS),
            ("pretrain_epochs", self.pretrain_epochs >= 0, "at least 0"),
        )

    def kept(self) -> str | None:
        """What a run that is stopped has kept, and how to go on; None for nothing."""
        there = read_records(Path(self.results)) or any(Path(self.output_dir, "checkpoints").glob("*/step_*[0-9]"))
        return f"{self.results} has what was finished, and the same command goes on there" if there else None


flags_first("compare", __name__, Arguments, __doc__)  # ahead of the slow imports
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import load_model, save_model

from hf_rwp.analysis.plots import comparison
from hf_rwp.analysis.timing import seconds_in_turns, timed
from hf_rwp.core.buffers import sync_buffers
from hf_rwp.core.placement import mixes
from hf_rwp.experiments.training import (
    Data,
    Training,
    default_settings,
    found_gamma,
    load_data,
    needs_gamma,
    options_of,
)
from hf_rwp.images.memory import Images
from hf_rwp.runs.checkpoints import remove_checkpoints, save_checkpoint
from hf_rwp.runs.comparison import (
    Record,
    accuracy_curves,
    best_settings,
    by_protocol,
    comparison_records,
    comparison_table,
    is_new,
    lock_output,
    refuse_another_comparison,
    resume_run,
    run_folder,
)
from hf_rwp.runs.determinism import use_fast_kernels
from hf_rwp.runs.files import replacing
from hf_rwp.runs.launch import check_comparison
from hf_rwp.runs.progress import Progress, epoch_figures
from hf_rwp.runs.records import append_record, command_of, environment, read_records, scrub_paths, without_nan
from hf_rwp.runs.screen import columns

FINDER_STEPS = 200  # of plain training, ahead of a search for gamma


def main(args: Arguments) -> None:
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, dynamo_backend="inductor" if args.torch_compile else None
    )
    check_comparison(accelerator)
    use_fast_kernels()
    torch._dynamo.config.recompile_limit = 256  # each model is compiled anew
    results, output_dir, replicas = Path(args.results), Path(args.output_dir), accelerator.num_processes
    data = load_data(args, accelerator.device, held_out=args.search or args.early_stopping)
    launcher = "python" if replicas == 1 else "accelerate launch"
    facts = {"command": command_of(f"{launcher} recipes/{RECIPE.name}", *described_arguments(args))}
    facts |= find_middle(args, accelerator, data)
    refuse_other_records(args, accelerator, data["digest"])
    lock = lock_output(output_dir, results) if accelerator.is_main_process else None
    facts |= environment(accelerator) | {"load_average": os.getloadavg()[0], "data_sha256": data["digest"]}
    per_step = args.batch_size * replicas
    if args.early_stopping and len(data["held_in"]) < len(data["train"]):
        raise ValueError(
            f"early_stopping needs held-out images that train nothing, and {len(data['train']) - len(data['held_in'])} "
            "of them are to train on: set train_images, or validation_images, so that both fit into the split"
        )
    if len(data["held_in" if args.search else "train"]) < per_step:
        raise ValueError(
            f"{len(data['train'])} images to train on, {len(data['held_in'])} in a search, are fewer than the "
            f"{per_step} of one step: set a smaller batch_size, more train_images, or fewer validation_images"
        )

    news, seen, shorter = 0, args.epochs * len(data["train"]), len(data["held_in"]) / len(data["train"])
    trials = [("trial", name, own, args.data_seed) for name in args.methods for own in grid(args, name)]
    runs = [("run", name, None, seed) for seed in args.seeds for name in args.methods]
    jobs = [*(trials if args.search else []), *runs]
    total = len(args.protocols) * len(jobs)
    progress = Progress(0, part=seen, unit="images", step=None, shown=accelerator.is_main_process)
    todo = []
    for protocol in args.protocols:
        measure = partial(seconds_per_step, accelerator, args, data)
        file = output_dir / "step_times.json"
        times = relative_times(accelerator, file, args.methods, measure) if protocol == "time" else {}
        for kind, name, settings, seed in jobs:
            options, method = options_of(args, name), METHODS[name]
            mixing = bool(options) and mixes(options["alpha"])
            steps, takes = count_steps(protocol, seen, per_step, method, mixing, times.get(name, 1.0))
            what = {"kind": kind, "task": task_of(args), "protocol": protocol, "method": name, "options": options}
            what |= {"settings": settings, "seed": seed, "replicas": replicas}
            what |= {"steps": steps if kind == "run" else max(1, round(shorter * steps))}
            todo.append((what, takes))
    progress.steps = sum(what["steps"] * takes for what, takes in todo)
    for number, (what, takes) in enumerate(todo, start=1):
        what["settings"] = what["settings"] or chosen(args, what["method"], what["protocol"])
        progress.note()  # the loss of the run before is not this one's
        terms = f", {what['protocol']}" if len(args.protocols) > 1 else ""
        progress.begin(f"{what['kind']} {number}/{total}, {what['method']}, seed {what['seed']}{terms}")
        news += run(accelerator, args, data, facts, what, takes, progress)
    progress.close()

    if accelerator.is_main_process:
        if not news:
            print(f"All of it is in {results} already; --results FILE begins another one")
        finished = by_protocol(comparison_records(results))
        pictures = {protocol: output_dir / f"{protocol}.png" for protocol in args.protocols}
        for protocol, picture in pictures.items():
            comparison(accuracy_curves(finished[protocol]), picture)
            table = comparison_table(finished[protocol], markdown=columns() is None)
            print(f"\n{args.name}, {PROTOCOLS[protocol]}\n\n{table}")
        print(f"\nWrote {results} and {', '.join(map(str, pictures.values()))}")
        lock.release()
    accelerator.end_training()


def find_middle(args: Arguments, accelerator: Accelerator, data: Data) -> dict[str, Any]:
    """Set the gamma that a search is around, where the flags leave it open: that of the trials that are there, else
    what `find_gamma` proposes. Returns it for the records."""
    if not (args.search and any(needs_gamma(args, name) for name in args.methods)):
        return {}
    trials = [record for record in comparison_records(Path(args.results)) if record["kind"] == "trial"]
    known = [trial.get("middle") for trial in trials if needs_gamma(args, trial["method"])]
    if not known:
        held_in = data["held_in"]
        known = [{"gamma": found_gamma(accelerator, args, data, held_in, FINDER_STEPS), "steps": FINDER_STEPS}]
    if known[0] is None:  # of a search that was around the default
        return {}
    args.rwp_gamma = known[0]["gamma"]
    return {"middle": known[0]}


def grid(args: Arguments, name: str) -> list[Settings]:
    return args.grid(default_settings(args, name)["strength"])


def chosen(args: Arguments, name: str, protocol: str) -> Settings:
    """What searches found best, this one's and those that `--settings_from` names, else the flags' settings."""
    own = Path(args.results)
    files = [own, *(own.with_name(f"{other}.jsonl") for other in args.settings_from)]
    found = best_settings([record for file in files for record in comparison_records(file)], name, protocol)
    if found is None and args.settings_from:
        raise ValueError(
            f"no search in {', '.join(args.settings_from)} has settings for {name}: leave settings_from out, or search"
        )
    return default_settings(args, name) if found is None else found


def seconds_per_step(accelerator: Accelerator, args: Arguments, data: Data, names: Sequence[str]) -> dict[str, float]:
    def training(name: str) -> "Training":
        settings = default_settings(args, name)
        return Training(accelerator, args, data, data["train"], name, settings, args.data_seed, 1000, args.batch_size)

    # Ten steps to a turn: one of them is SAM's where SAM is seldom.
    seconds = seconds_in_turns({name: training(name).step for name in names}, accelerator.device, count=10)
    accelerator.free_memory()
    medians = torch.tensor(list(seconds.values()), device=accelerator.device)
    return dict(zip(seconds, broadcast(medians).tolist(), strict=True))  # replicas must agree on steps


def run(
    accelerator: Accelerator,
    args: Arguments,
    data: Data,
    facts: Record,
    what: Record,
    per_step: int,
    progress: Progress,
) -> bool:
    """Train one model to the end and append its record, unless that is there already. Returns whether it trained.

    what: what makes it this run or trial, the head of its record. A `run` is on all training images, and evaluated on
    the test images; a `trial` is on and with those held in and out. per_step: images of a step. progress: of
    all runs together, counted in images.
    """
    kind, name, seed, steps, replicas = (what[key] for key in ("kind", "method", "seed", "steps", "replicas"))
    results, there = Path(args.results), comparison_records(Path(args.results))
    accelerator.wait_for_everyone()  # all replicas have read before the main one writes
    if not is_new(what, there, results):
        progress.skip(steps * per_step)
        return False
    images, judges = (data["train"], data["test"]) if kind == "run" else (data["held_in"], data["held_out"])
    training = Training(accelerator, args, data, images, name, what["settings"], seed, steps, per_step // replicas)
    before = begin_from_pretrained(args, data, training, images, judges) if args.pretrain_epochs else {}
    folder, new = run_folder(Path(args.output_dir), what), {"step": 0, "seconds": 0.0, "history": [], "gradients": 0}
    modules = {"average": training.average} if training.average else {}
    position = resume_run(accelerator, folder, new | {"slots": {"clean": 0, "perturbed": 0}}, modules)
    done, seconds, history, training.gradients, slots_before = position.values()
    progress.skip(done * per_step)

    def advance(stop: int) -> None:
        for number in range(done, stop):
            training.step(number)
            progress.advance(per_step)

    saved = seconds
    points = sorted({round(steps * part / args.evaluations) for part in range(1, args.evaluations + 1)} - {0})
    try:
        for point in (point for point in points if point > done):
            seconds += timed(partial(advance, point), accelerator.device)
            done, losses = point, training.tracker.compute()
            row = {"step": done, "epoch": done * per_step / len(images), "seconds": seconds}
            row |= {"gradients": training.gradients / len(images), "train_loss": losses.pop("loss")}
            history.append(row | losses | training.evaluate(judges))
            if args.early_stopping and kind == "run":
                history[-1]["held_out"] = training.evaluate(data["held_out"])["top1"]
            progress.note(loss=row["train_loss"])
            if not math.isfinite(row["train_loss"]):
                progress.skip((steps - done) * per_step)
                break  # diverged: the accuracy that it has is the result
            if done < steps and seconds - saved >= args.checkpoint_seconds:
                saved = seconds
                slots = training.report(slots_before).get("slots", slots_before)
                position = dict(zip(position, (done, seconds, history, training.gradients, slots), strict=True))
                save_checkpoint(accelerator, folder / f"step_{done}", position, modules)
                if accelerator.is_main_process:
                    remove_checkpoints(folder, keep=[done])
    finally:
        training.optimizer.eval()  # an interrupt may have left noise in the weights
    progress.say(progress.line(epoch_figures(history[-1])))
    did = training.report(slots_before)
    if did and all(layer["size"] < 1e-4 for layer in did["relative_noise"].values()):
        raise RuntimeError(
            f"{name} perturbed next to nothing, which is not a result of RWP: set rwp_gamma, rwp_start ({did})"
        )
    if accelerator.is_main_process:
        record = what | {"evaluations": args.evaluations, "batch_size": args.batch_size, "images_per_step": per_step}
        record |= {key: history[-1][key] for key in ("top1", "gradients", "seconds")} | ({"rwp": did} if did else {})
        record |= {"images": {"train": len(images), "evaluated": len(judges)}} | before
        if kind == "run":
            record |= stopped(history) if args.early_stopping else {"peak": max(row["top1"] for row in history)}
            if args.robustness_images:
                record["robustness"] = training.robustness(judges, args.robustness_images)
        append_record(results, without_nan(record | ({"history": history} if kind == "run" else {}) | facts))
        remove_checkpoints(folder, keep=[])
    accelerator.wait_for_everyone()  # what was appended may choose the next settings
    accelerator.free_memory()
    return True


def begin_from_pretrained(
    args: Arguments, data: Data, training: Training, images: Images, judges: Images
) -> dict[str, Any]:
    """Give a training the weights that plain training ends in, from a file if they are there. Returns what they are."""
    accelerator, seed, size = training.accelerator, training.seed, args.batch_size
    file = Path(args.output_dir) / "pretrained" / f"seed_{seed}_{len(images)}.safetensors"
    if not file.exists():
        steps = max(1, round(args.pretrain_epochs * len(images) / (size * accelerator.num_processes)))
        settings = {"lr": args.pretrain_lr, "weight_decay": args.pretrain_weight_decay, "strength": None}
        plain = Training(accelerator, args, data, images, "base", settings, seed, steps, size)
        for number in range(steps):
            plain.step(number)
        sync_buffers([plain.module])
        if accelerator.is_main_process:
            file.parent.mkdir(exist_ok=True)
            with replacing(file) as partial_file:
                save_model(plain.module, str(partial_file))
        accelerator.wait_for_everyone()
    load_model(training.module, file)
    if training.average is not None:
        training.average.module.load_state_dict(training.module.state_dict())
    found: dict[str, Any] = training.evaluate(judges)
    if args.robustness_images:
        found["robustness"] = training.robustness(judges, args.robustness_images)
    return {"before": found}


def stopped(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What would have been best of a run: as held-out images say (`early`), and in hindsight (`peak`)."""
    best = max(history, key=lambda row: row["held_out"])  # the first of equals
    return {"early": {key: best[key] for key in ("step", "held_out", "top1")}, "peak": max(r["top1"] for r in history)}


# What is written down.


def task_of(args: Arguments) -> dict[str, Any]:
    """What is learned and how, alike for the methods and settings that are compared."""
    others = {"methods", "protocols", "seeds", "search", "lrs", "weight_decays", "strengths", "lr", "weight_decay"}
    others |= {"name", "evaluations", "workers", "max_bad_images", "shuffle_buffer", "settings_from"}
    others |= {"early_stopping", "robustness_images", "checkpoint_seconds"}
    facts, defaults = described_arguments(args)
    kept = {key: value for key, value in facts.items() if key not in others and not key.startswith("rwp")}
    always = ("model", "epochs", "batch_size", "opt", "data_dir")
    return {key: value for key, value in kept.items() if value != defaults[key] or key in always}


def refuse_other_records(args: Arguments, accelerator: Accelerator, digest: str) -> None:
    """Raise ValueError where the file has runs that these cannot be compared to, or a search of another grid."""
    alike = {"replicas": accelerator.num_processes, "evaluations": args.evaluations, "data_sha256": digest}
    for record in comparison_records(Path(args.results)):
        name = record["method"]
        theirs = record["task"] | {key: record[key] for key in alike if key in record}
        ours = task_of(args) | {key: value for key, value in alike.items() if key in record}
        theirs |= {"options": record["options"], "mixed_precision": record["hardware"]["mixed_precision"]}
        ours |= {"options": options_of(args, name), "mixed_precision": accelerator.mixed_precision}
        if args.search and record["kind"] == "trial" and record["settings"] not in grid(args, name):
            theirs["a trial's settings"], ours["a trial's settings"] = record["settings"], "one of this grid"
        refuse_another_comparison(ours, theirs, Path(args.results))


def described_arguments(args: Arguments) -> tuple[dict, dict]:
    """The arguments as given, and their defaults for the same data."""
    defaults = asdict(Arguments(data_dir=args.data_dir, dataset=args.dataset))
    facts = scrub_paths(asdict(args))
    facts = {name: value for name, value in facts.items() if name not in ("results", "output_dir", "rwp")}
    return facts, defaults | {"data_dir": None, "dataset": None}


if __name__ == "__main__":
    start(main, Arguments, __doc__)
