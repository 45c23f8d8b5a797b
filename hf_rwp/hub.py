"""A trained model as a folder that timm, transformers and their users' scripts load as they load any other."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn


def save_model(
    model: nn.Module,
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
    target = Path(folder)
    partial, old = target.with_suffix(".partial"), target.with_suffix(".removed")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    source: Any = model.pretrained_cfg
    # What timm knows of its own weights, and its recommendations for testing them, are not true of these.
    others = dict.fromkeys(("tag", "license", "origin_url", "paper_ids", "notes", "description"))
    others |= dict.fromkeys(("test_input_size", "test_crop_pct", "pool_size"))
    partial.mkdir(parents=True)
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}  # not channels_last
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    config_file = partial / "config.json"
    try:
        of_ours: Any = {**source, **others, **data_config, "num_classes": len(label_names)}
        model.pretrained_cfg = of_ours
        save_config_for_hf(
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
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
