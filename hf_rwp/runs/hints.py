"""What was meant by a flag that there is not: one of a similar name, what timm and Hugging Face call so, or another
recipe's."""

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
_OF_RECIPES = {  # each flag of the recipes once, at the one to name to whoever gives it to another
    "train": "aa aug_repeats batch_size bce_loss bce_sum bce_target_thresh channels_last checkpointing_steps clip_grad "
    "clip_mode color_jitter cooldown_epochs crop_padding crop_pct cutmix cutout data_dir dataset "
    "dataset_config dataset_revision decay_epochs decay_milestones decay_rate deterministic drop drop_path "
    "epochs eval_only gradient_accumulation_steps hflip hub_logs hub_model_id hub_private hub_revision "
    "hub_strategy hub_tag image_column img_size interpolation label_column layer_decay logging_steps lr "
    "max_bad_images method min_lr mixed_precision mixup mixup_mode mixup_off_epoch mixup_prob "
    "mixup_switch_prob model model_ema model_ema_decay model_ema_warmup model_kwargs momentum num_classes opt "
    "opt_betas opt_eps output_dir overwrite_output_dir pretrained push_to_hub ratio recount remode report_to "
    "reprob resume_from_checkpoint rwp rwp_alpha rwp_antithetic rwp_beta rwp_eta rwp_frozen rwp_gamma "
    "rwp_growth rwp_noise rwp_noise_1d rwp_schedule rwp_seed rwp_start sam_rho save_total_limit "
    "scale sched seed shuffle_buffer smoothing streaming sync_bn torch_compile train_interpolation "
    "train_num_samples train_split validation_fraction validation_split vflip warmup_epochs warmup_lr "
    "weight_decay weight_decay_1d workers",
    "vit": "bf16 data_seed dataloader_num_workers dataloader_pin_memory disable_tqdm eval_steps eval_strategy "
    "gradient_checkpointing learning_rate load_best_model_at_end logging_nan_inf_filter logging_strategy "
    "lora_alpha lora_dropout lora_r lr_scheduler_type max_steps metric_for_best_model model_name_or_path "
    "num_train_epochs optim per_device_eval_batch_size per_device_train_batch_size rwp_split save_strategy "
    "warmup_steps",
    "lora": "assistant_only_loss attn_implementation base_dir base_steps completion_only_loss data_file "
    "dataset_train_split held_out known_file load_in_4bit load_in_8bit lora_target_modules max_length "
    "max_new_tokens packing quick records train_samples use_dora use_peft",
    "compare": "checkpoint_seconds early_stopping evaluations label_noise label_noise_kind lrs methods name "
    "pretrain_epochs pretrain_lr pretrain_weight_decay protocols results robustness_images search seeds "
    "settings_from small_stem strengths test_images train_images validation_images weight_decays",
    "gamma": "device draws gammas num_batches share steps text_file validate",
    "landscape": "grid iterations models noise num_images rho span",
    "benchmark": "collectives output rounds threads",
}


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
    habit, flag, plain = meant(name, names, close=False), meant(name, names), name.replace("-", "_")
    told = f"no flag {dashes}{name}"
    if habit is None and flag is None and plain in _ELSEWHERE:
        return f"{told}: {_ELSEWHERE[plain]}"
    recipe = next((recipe for recipe, flags in _OF_RECIPES.items() if plain in flags.split()), None)
    if habit is None and recipe is not None:
        told += f" (a flag of {recipe})"
    return told if flag is None else f"{told}; did you mean {dashes and '--'}{flag}?"


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
