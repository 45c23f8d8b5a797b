"""The facts that a model card states, from what a run left behind; `card` renders them.

`results` is what a recipe writes to results.json. Everything in it is optional but `arguments`: a card says what is
known, and leaves out the rest.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_rwp.runs.counts import few_classes

PAPER = "2211.11489"
DIGITS = "Handwritten digits (scikit-learn)"
PICTURES = {  # files that a card shows if its repository has them, and what they show, for those who cannot see it
    "curves.png": "Losses in training and on held-out {kind}, and held-out accuracy, over the epochs",
    "confusion.png": "Confusion matrix: which classes the held-out images of each class are taken for",
    "landscape.png": "The loss on a plane through the trained weights, as contours and as a surface",
}
_TASKS = {  # by the end of a model's class: what the Hub calls its task, and transformers' class that loads it
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification"),
}
_OF_PEFT = ("text-generation", "text-classification", "token-classification", "question-answering")
_HARDEST = 3  # classes on a card
_METHODS = {"rwp": "Random Weight Perturbation", "sam": "sharpness-aware minimization (SAM)", "base": "plain training"}
_METRICS = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy", "accuracy": "Accuracy"}
_HYPER_PARAMETERS = (
    *("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rwp_frozen"),
    *("rwp_noise", "rwp_noise_1d", "rwp_antithetic", "rwp_schedule", "rwp_growth", "rwp_start"),
    *("rwp_eta", "rwp_beta", "rwp_seed", "rwp_split"),
    *("sam_rho", "epochs", "num_train_epochs", "max_steps", "batch_size", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "aug_repeats", "opt", "optim", "lr", "learning_rate", "weight_decay", "momentum"),
    *("layer_decay", "clip_grad", "max_grad_norm", "sched", "lr_scheduler_type", "warmup_epochs", "warmup_steps"),
    *("warmup_ratio", "min_lr", "mixup", "cutmix", "smoothing", "label_smoothing_factor", "bce_loss", "drop"),
    *("drop_path", "model_ema", "model_ema_decay", "img_size", "scale", "crop_padding", "hflip", "color_jitter"),
    *("aa", "reprob", "cutout", "sync_bn", "pretrained", "model_name_or_path", "seed"),
)


@dataclass(frozen=True)
class Facts:
    """What the template `model_card.md` shows."""

    # From the user
    repo_id: str | None = None
    license: str | None = None
    language: str | Sequence[str] | None = None
    base_model: str | None = None  # an id on the Hub
    dataset: str | None = None  # an id on the Hub
    dataset_config: str | None = None
    dataset_revision: str | None = None  # a commit
    note: str = ""
    tags: Sequence[str] = ()

    # Filled by the run
    name: str = "model"
    library: str = "timm"
    task: str | None = None  # as the Hub calls it
    architecture: str = ""
    method: str = "base"
    gamma: float | None = None
    alpha: float | None = None
    placement: str | None = None
    replicas: int | None = None
    slots: Mapping[str, int] | None = None
    data: str = ""
    kind: str = "images"  # what was learned from
    split: str | None = None
    held_out: bool = True  # whether evaluation was on other images than training
    evaluated_on: str | None = None  # in words, where that is not a split of the data's source
    notes: Sequence[str] = ()  # what was decided about the data
    metrics: Mapping[str, float] = field(default_factory=dict)
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    command: str | None = None
    date: str | None = None

    # Computed once
    figures: Mapping[str, str] = field(default_factory=dict)
    by_epoch: bool = False  # whether results.json has more rows than the last
    pictures: Mapping[str, str] = field(default_factory=dict)

    @property
    def method_name(self) -> str:
        return _METHODS.get(self.method, self.method)

    @property
    def is_timm(self) -> bool:
        return self.library == "timm"

    @property
    def auto_class(self) -> str:
        """The class of transformers, or of PEFT, that loads it."""
        found = next((name for task, name in _TASKS.values() if task == self.task), "AutoModel")
        if self.library != "peft":
            return found
        return found.replace("AutoModel", "AutoPeftModel") if self.task in _OF_PEFT else "AutoPeftModel"

    @property
    def address(self) -> str:
        """For `timm.create_model`."""
        return f"hf-hub:{self.repo_id}" if self.repo_id else "local-dir:path/to/this/folder"

    @property
    def machine(self) -> str:
        texts = {"device": "{}", "cores": "{} cores", "threads": "{} threads", "mixed_precision": "mixed precision: {}"}
        return ", ".join(texts[name].format(self.hardware[name]) for name in texts if self.hardware.get(name))

    @property
    def metadata(self) -> dict[str, Any]:
        """The card's head, as `ModelCardData` takes it, without the results."""
        tags = [self.task] if self.task else []
        tags += [*self.tags, self.method, *(["timm"] if self.is_timm else [])]
        known = {
            "library_name": self.library,
            "pipeline_tag": self.task,
            "license": self.license,
            "language": self.language,
            "base_model": self.base_model,
            "datasets": [self.dataset] if self.dataset else None,
            "metrics": ["accuracy"] if self.metrics else None,
            "tags": list(dict.fromkeys([*tags, f"arxiv:{PAPER}"])),
        }
        return {name: value for name, value in known.items() if value is not None}

    @property
    def evaluation(self) -> list[dict[str, Any]]:
        """The results in the card's head, each as `EvalResult` takes it: all of one split, accuracies as fractions."""
        if self.task is None or not self.held_out:
            return []
        common = {
            "task_type": self.task,
            "dataset_type": self.dataset or re.sub(r"\W+", "-", self.data.lower()).strip("-") or "unknown",
            "dataset_name": self.data or "unknown",
            "dataset_split": self.split,
            "metric_type": "accuracy",
        }
        return [common | {"metric_name": _METRICS[key], "metric_value": value} for key, value in self.metrics.items()]

    @property
    def benchmark(self) -> dict[str, Any] | None:
        """The first result as `EvalResultEntry` takes it; None where it is not of a data set's own held-out part."""
        if not self.evaluation or self.evaluated_on or not re.fullmatch(r"[\w.-]+/[\w.-]+", self.dataset or ""):
            return None
        first, on = self.evaluation[0], f", split {self.split}" if self.split else ""
        entry = {
            "dataset_id": self.dataset,
            "task_id": self.dataset_config or "default",
            "value": first["metric_value"],
            "notes": f"{first['metric_name']} as a fraction{on}",
            "date": self.date,
        }
        if re.fullmatch("[0-9a-f]{40}", self.dataset_revision or ""):
            entry["dataset_revision"] = self.dataset_revision
        if self.repo_id:
            entry["source_url"] = f"https://huggingface.co/{self.repo_id}/blob/main/results.json"
            entry["source_name"] = "results.json"
        return entry


def build_facts(
    results: Mapping[str, Any], *, architecture: str | None = None, pictures: Sequence[str] = (), **user: Any
) -> Facts:
    """Facts of a run from its results. user: the fields of `Facts` that the user fills; they win over the run's.

    pictures: names of the files beside the card. Where an average of the weights was evaluated, its figures count: it
    is what was saved.
    """
    results = plain(results)
    arguments, final = results["arguments"], results.get("final", {})
    method = arguments.get("method") or ("rwp" if arguments.get("rwp") else "base")
    rwp = final.get("rwp", {}) if method == "rwp" else {}
    averaged = "top1_ema" in final
    metrics = {key: final.get(f"{key}_ema", final.get(key)) for key in _METRICS}
    metrics = {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}
    if few_classes(results):
        metrics.pop("top5", None)  # always right
    model = architecture or arguments.get("model") or ""
    known_task = next((task for ending, (task, _) in _TASKS.items() if model.endswith(ending)), None)
    images = "top1" in metrics or user.get("library", "timm") == "timm" or known_task == "image-classification"
    kind = "images" if images else "samples"
    split = results.get("found", {}).get("splits", {}).get("validation")
    data_split = results.get("data", {}).get("validation", {}).get("split")
    made = bool(split) and split.startswith("held out ")
    facts: dict[str, Any] = {
        "task": "image-classification" if images else known_task,
        "base_model": results.get("base_model") or _hub_id(arguments.get("pretrained")),
        "dataset": results.get("dataset") or arguments.get("dataset"),
        "dataset_config": arguments.get("dataset_config"),
        "dataset_revision": arguments.get("dataset_revision"),
        "name": (user.get("repo_id") or "").split("/")[-1] or f"{model or 'model'}_{method}",
        "architecture": model,
        "method": method,
        "gamma": rwp.get("gamma", arguments.get("rwp_gamma")) if method == "rwp" else None,
        "alpha": rwp.get("alpha", arguments.get("rwp_alpha")) if method == "rwp" else None,
        "placement": rwp.get("placement"),
        "replicas": results.get("hardware", {}).get("replicas", rwp.get("replicas")),
        "slots": rwp.get("slots"),
        "data": results.get("dataset") or _data(arguments),
        "kind": kind,
        "split": None if made else split or data_split or arguments.get("validation_split"),
        "evaluated_on": split if made else None,
        "held_out": results.get("found", {}).get("held_out", True),
        "notes": results.get("found", {}).get("notes", ()),
        "metrics": metrics,
        "hyper_parameters": {key: arguments[key] for key in _HYPER_PARAMETERS if _said(key, arguments, method)},
        "hardware": results.get("hardware", {}),
        "versions": results.get("versions", {}),
        "commit": results.get("git_commit"),
        "command": results.get("command"),
        "date": results.get("date"),
        "by_epoch": bool(results.get("history")),
        "figures": _figures(results, metrics, averaged, kind),
        "pictures": {file: _said_of(file, results, metrics, kind) for file in PICTURES if file in pictures},
    }
    return Facts(**(facts | {name: value for name, value in user.items() if value is not None}))


def plain(value: Any) -> Any:
    """A value with Python's own numbers and lists in place of those of NumPy and torch."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _said(name: str, arguments: Mapping[str, Any], method: str) -> bool:
    """Whether an argument did anything."""
    if {"rwp_": "rwp", "sam_": "sam"}.get(name[:4], method) != method:
        return False
    needed = {"rwp_beta": "rwp_eta", "model_ema_decay": "model_ema"}
    if name in needed and not arguments.get(needed[name]):
        return False
    if name == "scale" and arguments.get("crop_padding") is not None:  # a crop of another kind
        return False
    value = arguments.get(name)
    if name == "rwp_split":  # which most leave on
        return value is False
    return value not in (None, "", []) and value is not False and (value != 0 or name in ("rwp_seed", "seed"))


def _data(arguments: Mapping[str, Any]) -> str:
    folder = (arguments.get("data_dir") or "").rstrip("/").split("/")[-1]
    if "data_dir" not in arguments:
        return arguments.get("dataset") or ""
    return arguments.get("dataset") or folder or DIGITS


def _hub_id(value: str | None) -> str | None:
    """An argument's value if it names something on the Hub: a folder's name was cut to its last part."""
    return value if value and value.count("/") == 1 else None


def _figures(results: Mapping[str, Any], metrics: Mapping[str, float], averaged: bool, kind: str) -> dict[str, str]:
    """The rows of the card's table."""
    final, data = results.get("final", {}), results.get("data", {})
    images = data.get("validation", {}).get("images")
    found = results.get("found", {})
    which = f"held-out {kind}" if found.get("held_out", True) else f"of the {kind} that it was trained on"
    on = f" on {images:,} {which}" if images else f", {which}"
    rows = {f"{_METRICS[key]}{on}": f"{value:.2%}".replace("%", " %") for key, value in metrics.items()}
    loss = final.get("eval_loss_ema" if averaged else "eval_loss")
    rows |= _row(f"Loss, {which}", loss, ".4f")
    hardest = _hardest(results)
    if hardest:
        rows["Hardest classes, and the accuracy on each"] = hardest
    rows |= _row("Training loss", final.get("train_loss"), ".4f")
    rows |= _row("Training loss at clean weights", final.get("loss_clean"), ".4f")
    rows |= _row("Training loss at perturbed weights", final.get("loss_perturbed"), ".4f")
    epoch, total = final.get("epoch"), results["arguments"].get("epochs")
    if epoch is not None:
        of = f" of {total}" if total and epoch < total else ""
        rows["Epochs" + (", up to the best evaluation" if results.get("chosen") == "best" else "")] = f"{epoch:g}{of}"
    rows |= _row("Optimizer steps", final.get("step"), ",")
    slots = final.get("rwp", {}).get("slots")
    if slots:
        rows["Gradients at clean / perturbed weights"] = f"{slots['clean']:,} / {slots['perturbed']:,}"
    noise = final.get("rwp", {}).get("relative_noise", {}).get("largest")
    if noise:
        rows["Noise relative to the weights, largest layer"] = f"{noise['size']:.2g} ({noise['name']})"
    rows |= _row("Training images", data.get("train", {}).get("images"), ",")
    classes = _classes(found.get("classes", {}).get("train", {}))
    if classes:
        rows["Classes, and training images of each"] = classes
    if found.get("ignored"):
        rows["Files left out"] = ", ".join(f"{count:,} {reason}" for reason, count in found["ignored"].items())
    rows |= _row("Weights in the model", results.get("model", {}).get("weights"), ",")
    rows |= _row("Images in a step", (results.get("images_per_step") or {}).get("images"), ",")
    rows |= _row("Training time, seconds", results.get("seconds"), ",.1f")
    rows |= _row("Images per second", final.get("images_per_second"), ",.0f")
    return rows


def _hardest(results: Mapping[str, Any]) -> str:
    """The classes of the lowest accuracy, without those that have no mistakes."""
    by_class = results.get("by_class") or {"names": (), "accuracy": ()}
    known = zip(by_class["names"], by_class["accuracy"], strict=True)
    wrong = sorted([pair for pair in known if pair[1] is not None and pair[1] < 1], key=lambda pair: pair[1])
    return ", ".join(f"{name} {100 * right:.1f} %" for name, right in wrong[:_HARDEST])


def _said_of(file: str, results: Mapping[str, Any], metrics: Mapping[str, float], kind: str) -> str:
    """What a picture shows, in words: the figures of its end, too."""
    text, hardest = PICTURES[file].format(kind=kind), _hardest(results)
    if file == "curves.png" and metrics and results.get("chosen") != "best":
        text += f"; {100 * next(iter(metrics.values())):.2f} % at the end"
    if file == "confusion.png" and hardest:
        text += f"; hardest are {hardest}"
    return re.sub(r"[\[\]()\\<>`]+", " ", " ".join(text.split()))


def _classes(counts: Mapping[str, Any]) -> str:
    """Of the counts by class, or of the fewest and the most where there are many classes."""
    if isinstance(counts.get("most"), Mapping):
        (most, largest), (fewest, smallest) = (next(iter(counts[name].items())) for name in ("most", "fewest"))
        return f"{counts['count']:,}, {smallest:,} ({fewest}) to {largest:,} ({most})"
    return f"{len(counts)}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()) if counts else ""


def _row(name: str, value: float | None, form: str) -> dict[str, str]:
    return {} if value is None or not math.isfinite(value) else {name: format(value, form)}
