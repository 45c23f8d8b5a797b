"""A trained model's weights as a folder that timm and transformers load as they load any other: safetensors alone."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def save_model(
    model: "nn.Module",
    folder: str | os.PathLike[str],
    *,
    label_names: Sequence[str],
    data_config: Mapping[str, Any],
    model_args: Mapping[str, Any] | None = None,
) -> None:
    """Write a timm model's weights (safetensors) and config.json, in place of what `folder` held, whole or not at all.

    `timm.create_model("local-dir:FOLDER", pretrained=True)`, `AutoModelForImageClassification.from_pretrained(FOLDER)`
    and `pipeline("image-classification", FOLDER)` then give the same logits for the same image.

    label_names: the classes' names, by index. data_config: the preprocessing it was evaluated with, as
    `timm.data.resolve_data_config` gives. model_args: the arguments of `timm.create_model` beside the classes.
    """
    from safetensors.torch import save_file
    from timm.models import _hub as timm_hub

    target = Path(folder)
    partial = _emptied(target)
    source: Any = model.pretrained_cfg
    # What timm knows of its own weights, and its recommendations for testing them, are not true of these.
    others = dict.fromkeys(("tag", "license", "origin_url", "paper_ids", "notes", "description"))
    others |= dict.fromkeys(("test_input_size", "test_crop_pct", "pool_size"))
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}  # not channels_last
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    config_file = partial / "config.json"
    try:
        of_ours: Any = {**source, **others, **data_config, "num_classes": len(label_names)}
        model.pretrained_cfg = of_ours
        timm_hub.save_config_for_hf(
            model,
            str(config_file),
            model_config={"label_names": list(label_names)},
            model_args={**(model_args or {})},
        )
    finally:
        model.pretrained_cfg = source
    config = json.loads(config_file.read_text())
    # transformers passes model_args on beside the number of classes, and timm knows that from num_classes alone.
    (config.get("model_args") or {}).pop("num_classes", None)
    config_file.write_text(json.dumps(config, indent=2))
    _take_place(partial, target)


def save_any(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """`save_model` for timm's models, transformers' `TimmWrapper` too; else `save_pretrained`, or the weights alone.

    Returns the facts that the model itself tells: library and architecture.
    """
    model = _unwrapped(model)
    names = [*getattr(getattr(model, "config", None), "id2label", {}).values()]
    trained = getattr(getattr(model, "config", None), "pretrained_cfg", None) or {}
    arguments = getattr(getattr(model, "config", None), "model_args", None)
    if not hasattr(model, "get_base_model"):  # PEFT's models pass on what is asked of them
        model = getattr(model, "timm_model", model)
    if not hasattr(model, "get_base_model") and hasattr(model, "pretrained_cfg"):
        from timm.data.config import resolve_data_config

        config = {**model.pretrained_cfg, **trained}
        classes = range(getattr(model, "num_classes", 0))
        if label_names is not None and len(label_names) != len(classes):
            raise ValueError(f"{len(label_names)} label_names for a model of {len(classes)} classes: give one for each")
        known = [list(label_names or ()), names, config.get("label_names") or (), [str(label) for label in classes]]
        label_names = next(some for some in known if len(some) == len(classes))
        data_config = data_config or resolve_data_config({}, pretrained_cfg=config)
        save_model(model, folder, label_names=label_names, data_config=data_config, model_args=model_args or arguments)
        return {"library": "timm", "architecture": config.get("architecture") or type(model).__name__}
    target = Path(folder)
    partial = _emptied(target)
    if not hasattr(model, "save_pretrained"):
        from safetensors.torch import save_model as save_weights

        save_weights(model, str(partial / "model.safetensors"))
        _take_place(partial, target)
        return {"library": "pytorch", "architecture": type(model).__name__}
    model.save_pretrained(partial)
    _take_place(partial, target)
    adapted = hasattr(model, "get_base_model")
    whole = model.get_base_model() if adapted else model
    return {"library": "peft" if adapted else "transformers", "architecture": type(whole).__name__}


def _unwrapped(model: Any) -> Any:
    """The model inside of DistributedDataParallel and torch.compile."""
    for name in ("module", "_orig_mod", "module"):
        inner = getattr(model, name, None)
        model = inner if hasattr(inner, "state_dict") else model
    return model


def _emptied(target: Path) -> Path:
    """An empty folder beside `target`, to be filled and then to take its place.

    Raises FileExistsError where `target` holds something else than a model that was written before.
    """
    found = list(target.iterdir()) if target.is_dir() else []
    written = any(path.suffix in (".safetensors", ".bin") for path in found)
    foreign = [path.name for path in found if path.is_dir() and path.name != "logs"]
    if found and (foreign or not written):
        raise FileExistsError(
            f"{target} is no folder of a model and would be replaced, with {(foreign or [found[0].name])[0]} in it: "
            "name another one"
        )
    partial = target.with_name(f"{target.name}.partial")
    for leftover in (partial, target.with_name(f"{target.name}.removed")):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _take_place(partial: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}.removed")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
