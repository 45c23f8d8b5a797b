"""Files of flags, `--config FILE.yaml`: those of the recipes, and the args.yaml that timm's train.py leaves behind."""

import difflib
import json
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from hf_rwp.runs.files import recipes_folder
from hf_rwp.runs.hints import RENAMED, meant, no_flag

logger = logging.getLogger(__name__)

# timm's names of those that become another flag's value: see recipes/README.md.
COMPUTED = (
    *("amp", "amp_dtype", "native_amp", "torchcompile", "grad_accum_steps", "lr_base", "lr_base_size", "lr_base_scale"),
    *("input_size", "output", "experiment", "log_wandb"),
)
# timm's names of what there is not here. Where one is 0, false or empty, nothing is lost.
WITHOUT_MEANING = {
    *("amp_impl", "apex_amp", "aug_splits", "bce_pos_weight", "bn_eps", "bn_momentum", "class_map"),
    *("color_jitter_prob", "cutmix_minmax", "dataset_download", "dataset_trust_remote_code", "device"),
    *("device_modules", "dist_bn", "drop_block", "drop_connect", "epoch_repeats", "eval_metric", "fast_norm"),
    *("fuser", "gaussian_blur_prob", "gp", "grad_checkpointing", "grayscale_prob", "head_init_bias"),
    *("head_init_scale", "in_chans", "input_img_mode", "jsd_loss", "local_rank", "lr_cycle_decay", "lr_cycle_limit"),
    *("lr_cycle_mul", "lr_k_decay", "lr_noise", "lr_noise_pct", "lr_noise_std", "mean", "model_dtype"),
    *("model_ema_force_cpu", "no_aug", "no_ddp_bb", "no_prefetcher", "no_resume_opt", "opt_kwargs"),
    *("patience_epochs", "pin_mem", "resplit", "resume", "save_images", "sched_on_updates", "split_bn"),
    *("start_epoch", "std", "synchronize_step", "torchcompile_mode", "torchscript", "train_crop_mode", "tta"),
    *("use_multi_epochs_loader", "val_num_samples", "validation_batch_size", "wandb_project", "wandb_resume_id"),
    *("wandb_tags", "warmup_prefix", "worker_seeding"),
}


def read_config(path: str, names: Collection[str], ignore: bool = False, logs: bool = True) -> dict[str, list[str]]:
    """The flags in a YAML file as words of a command line, by name; timm's names and values are translated.

    Nulls and empty strings are not set. names: of the flags that there are. ignore: whether names that are not among
    them are passed over; logs: and logged. Raises ValueError for a file of something else, and for such names.
    """
    text = _text(path)
    settings = _loaded(path, text) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no flags: each must be a line of its own, `name: value`")
    _check_that_each_stands_once(path, text)
    settings = {str(name).replace("-", "_"): value for name, value in settings.items() if value not in (None, "")}
    settings = from_timm(settings, names, replicas=int(os.environ.get("WORLD_SIZE", "1")))
    unknown = [name for name in settings if name not in names]
    if unknown and not ignore:
        raise ValueError(_no_such_names(path, unknown, names))
    if unknown and logs and os.environ.get("RANK", "0") == "0":
        logger.warning("%s: passed over, as they mean nothing here: %s", path, ", ".join(unknown))
    return {name: _words(name, value) for name, value in settings.items() if name in names}


def where_in(path: str, name: str) -> str:
    """The file, and the line of a flag in it, where it is there under that name or timm's."""
    keys = dict(_lines(_text(path)))
    lines = {RENAMED.get(key, key): line for key, line in keys.items()} | keys
    return f"{path}, line {lines[name]}" if name in lines else path


def _text(path: str) -> str:
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f"--config {path} is a folder: name a file in it{_similar(file)}")
    if not file.is_file():
        raise ValueError(f"--config {path}: there is no such file{_similar(file)}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--config {path} is no text, but a file of flags has a line for each, `name: value`"
        ) from error


def _similar(file: Path) -> str:
    """A question: whether one with its ending was meant, one beside it or in it, or one of the recipes'."""
    near = sorted(file.glob("*.yaml") if file.is_dir() else file.parent.glob("*.yaml"))
    stems = {one.stem: one for one in [*sorted((recipes_folder() / "configs").rglob("*.yaml")), *near]}
    names = [one.stem for one in near][:1] if file.is_dir() else difflib.get_close_matches(file.stem, stems, 1)
    return f"; did you mean {os.path.relpath(stems[names[0]])}?" if names else ""


def _loaded(path: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{where}: not YAML ({problem}). Each flag is a line of its own, `name: value`") from error


def _lines(text: str) -> list[tuple[str, int]]:
    """The flags in a file, each with the number of its line."""
    marks: Any = yaml.compose(text)
    return [(str(key.value).replace("-", "_"), key.start_mark.line + 1) for key, _ in marks.value] if marks else []


def _check_that_each_stands_once(path: str, text: str) -> None:
    """ValueError where a flag has two lines: YAML would take the last and drop the others without a word."""
    lines: dict[str, int] = {}
    for name, line in _lines(text):
        if lines.setdefault(name, line) != line:
            raise ValueError(f"{path}, line {line}: {name} is set on line {lines[name]} already. Keep one of them")


def _no_such_names(path: str, unknown: Collection[str], names: Collection[str]) -> str:
    """What to say of names in a file that are no flags: what was meant by the first of which it can be told."""
    for name in unknown:
        if meant(name, names, close=name not in WITHOUT_MEANING) is not None:
            return f"{where_in(path, name)}: {no_flag(name, names, dashes='')}"
    return (
        f"{path} has names that mean nothing here: {', '.join(unknown)}. Take them out, or pass over them with "
        "--config_ignore_unknown"
    )


def from_timm(settings: dict[str, Any], names: Collection[str], replicas: int = 1) -> dict[str, Any]:
    """Settings under the names and with the values that they have here; what is not a setting of timm's stays as it is.

    names: of the flags that there are. replicas: that the run will have, for a learning rate that depends on them.
    """
    ours = {name: value for name, value in settings.items() if name in names or name not in (*RENAMED, *COMPUTED)}
    timms = {name: value for name, value in settings.items() if name not in ours}
    ours |= {RENAMED[name]: value for name, value in timms.items() if name in RENAMED}
    if isinstance(ours.get("pretrained"), bool) and not ours["pretrained"]:
        del ours["pretrained"]
    for name in ("aug_repeats", "checkpointing_steps"):
        if ours.get(name) == 0:
            del ours[name]
    if {"val_split", "checkpoint_hist"} & timms.keys():  # timm's own file, where these are found under any usual name
        for name, default in (("train_split", "train"), ("validation_split", "validation")):
            if ours.get(name) == default:
                del ours[name]
    ours = _of_timms_dataset(ours)
    if timms.get("amp") or timms.get("native_amp"):
        ours["mixed_precision"] = "bf16" if timms.get("amp_dtype") == "bfloat16" else "fp16"
    if timms.get("torchcompile"):
        ours["torch_compile"] = True
    if timms.get("log_wandb"):
        ours["report_to"] = ["wandb"]
    size = timms.get("input_size")
    if size and "img_size" not in ours:
        ours["img_size"] = size[-1]
    folders = [timms[name] for name in ("output", "experiment") if name in timms]
    if folders:
        ours["output_dir"] = os.path.join(*folders if "output" in timms else ("outputs", *folders))
    parts = max(1, timms.get("grad_accum_steps", 1))
    if parts > 1:  # timm counts the images of one part
        ours["gradient_accumulation_steps"] = parts
        ours["batch_size"] = parts * ours.get("batch_size", 128)
    if "lr_base" in timms and "lr" not in ours:
        ours["lr"] = _scaled_rate(timms, str(ours.get("opt", "sgd")), replicas * ours.get("batch_size", 128))
    return {name: value for name, value in ours.items() if value or name not in WITHOUT_MEANING}


def _of_timms_dataset(ours: dict[str, Any]) -> dict[str, Any]:
    """timm's `dataset` is a kind of data with its name: `hfds/ID`, `wds/NAME`, or for folders nothing."""
    kind, _, name = str(ours.get("dataset", "")).partition("/")
    if kind in ("hfds", "hfids") and name:
        streams = {"streaming": True} if kind == "hfids" else {}
        return {key: value for key, value in ours.items() if key != "data_dir"} | {"dataset": name} | streams
    if kind in ("image_folder", "folder", "wds"):
        return {key: value for key, value in ours.items() if key != "dataset"}
    return ours


def _scaled_rate(timms: dict[str, Any], opt: str, batch: int) -> float:
    """timm's learning rate for a batch over all replicas."""
    ratio = batch / timms.get("lr_base_size", 256)
    scale = timms.get("lr_base_scale") or ("sqrt" if "ada" in opt.lower() or "lamb" in opt.lower() else "linear")
    rate: float = timms["lr_base"] * (ratio**0.5 if scale == "sqrt" else ratio)
    return rate


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    if name == "pretrained" and value is True:
        return []  # timm's own weights
    return [json.dumps(value) if isinstance(value, dict) else str(value)]
