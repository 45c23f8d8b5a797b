"""What was meant by a flag that there is not: one of a similar name, or what timm and Hugging Face call by its name."""

import difflib
from collections.abc import Collection

# timm's names for what is called otherwise here; a file may have them (`configs.from_timm`).
RENAMED = {
    "data": "data_dir",
    "val_split": "validation_split",
    "input_key": "image_column",
    "target_key": "label_column",
    "initial_checkpoint": "pretrained",
    "pretrained_path": "pretrained",
    "log_interval": "logging_steps",
    "recovery_interval": "checkpointing_steps",
    "checkpoint_hist": "save_total_limit",
}

# By the name that others have, what it may be here; the first that a recipe has is the one. A value may follow a flag.
_SIZE, _RESUME = ("batch_size", "per_device_train_batch_size"), ("resume_from_checkpoint",)
_MODEL = ("model", "model_name_or_path", "models")
_HABITS: dict[str, tuple[str, ...]] = {
    "adam_beta1": ("opt_betas",),
    "adam_beta2": ("opt_betas",),
    "adam_epsilon": ("opt_eps",),
    "alpha": ("rwp_alpha",),
    "amp": ("mixed_precision bf16", "bf16"),
    "amp_dtype": ("mixed_precision", "bf16"),
    "b": _SIZE,
    "batch_size": _SIZE,
    "bf16": ("mixed_precision bf16",),
    "checkpoint": _RESUME,
    "clip_grad": ("max_grad_norm",),
    "data": ("data_dir", "data_file"),
    "dataloader_num_workers": ("workers",),
    "dataset_config_name": ("dataset_config",),
    "dataset_name": ("dataset",),
    "dataset_split_name": ("train_split", "dataset_train_split"),
    "epochs": ("num_train_epochs",),
    "evaluate": ("eval_only", "do_eval"),
    "experiment": ("output_dir",),
    "fp16": ("mixed_precision fp16",),
    "gamma": ("rwp_gamma", "gamma"),
    "grad_accum_steps": ("gradient_accumulation_steps",),
    "grad_checkpointing": ("activation_checkpointing",),
    "hub_private": ("hub_private_repo",),
    "hub_private_repo": ("hub_private",),
    "image_size": ("img_size",),
    "initial_checkpoint": ("pretrained", "model_name_or_path"),
    "input_size": ("img_size",),
    "j": ("workers", "dataloader_num_workers"),
    "label_smoothing_factor": ("smoothing",),
    "learning_rate": ("lr",),
    "log_wandb": ("report_to wandb",),
    "lora_rank": ("lora_r",),
    "lr": ("learning_rate",),
    "lr_scheduler_type": ("sched",),
    "max_grad_norm": ("clip_grad",),
    "mixed_precision": ("bf16",),
    "model": _MODEL,
    "model_name": _MODEL,
    "model_name_or_path": _MODEL,
    "num_epochs": ("epochs", "num_train_epochs"),
    "num_train_epochs": ("epochs",),
    "num_workers": ("workers", "dataloader_num_workers"),
    "opt": ("optim",),
    "opt_betas": ("adam_beta1",),
    "opt_eps": ("adam_epsilon",),
    "optim": ("opt",),
    "output": ("output_dir",),
    "per_device_eval_batch_size": ("batch_size",),
    "per_device_train_batch_size": ("batch_size",),
    "pretrained": ("model_name_or_path",),
    "resume": _RESUME,
    "rho": ("sam_rho",),
    "sam": ("method sam",),
    "save_steps": ("checkpointing_steps",),
    "sched": ("lr_scheduler_type",),
    "smoothing": ("label_smoothing_factor",),
    "torchcompile": ("torch_compile",),
    "train_dir": ("data_dir", "data_file"),
    "train_file": ("data_file",),
    "validation_dir": ("data_dir", "known_file"),
    "warmup_epochs": ("warmup_steps",),
    "warmup_ratio": ("warmup_epochs", "warmup_steps"),
    "warmup_steps": ("warmup_epochs",),
    "wd": ("weight_decay",),
    "workers": ("dataloader_num_workers",),
}
_ELSEWHERE = dict.fromkeys(("rho", "sam", "sam_rho", "method"), "SAM is in imagenet_rwp.py and compare.py")


def meant(name: str, names: Collection[str], close: bool = True) -> str | None:
    """The flag among `names` that somebody who wrote `name` wants, with its value where that is known; None: no idea.

    close: whether it may be a name that is mistyped or cut short.
    """
    name = name.replace("-", "_")
    for habit in (name, RENAMED.get(name, name)):
        for flag in (*_HABITS.get(habit, ()), *({habit} - {name})):
            if flag.partition(" ")[0] in names:
                return flag
    if not close:
        return None
    lower = name.lower()
    longer = sorted((one for one in names if one.startswith(lower)), key=len) if len(lower) > 2 else []
    return next(iter(longer or difflib.get_close_matches(lower, names, n=1, cutoff=0.7)), None)


def no_flag(name: str, names: Collection[str], dashes: str = "--") -> str:
    """The sentence that says so. name: without dashes. dashes: those that it was written with."""
    flag = meant(name, names)
    if flag is not None:
        return f"no flag {dashes}{name}; did you mean {dashes and '--'}{flag}?"
    elsewhere = _ELSEWHERE.get(name.replace("-", "_"))
    return f"no flag {dashes}{name}" + (f": {elsewhere}" if elsewhere else "")


def no_such_flags(unknown: Collection[str], names: Collection[str]) -> str:
    """What to say of the words of a command line that no flag takes."""
    flags = [word for word in unknown if word.startswith("-") and word.strip("-")[:1].isalpha()]
    if not flags:
        return f"{' '.join(unknown)}: values follow the name of a flag, as in --name value. --help lists the flags"
    said = []
    for word in flags:
        name = word.lstrip("-").partition("=")[0]
        said.append(no_flag(name, names, word[: len(word) - len(word.lstrip("-"))]))
    told = " ".join(sentence if sentence.endswith("?") else f"{sentence}." for sentence in said)
    return told if told.count("?") == len(said) else f"{told} --help lists the flags that there are"
