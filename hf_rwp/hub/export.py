"""A trained model's weights as a folder that timm and transformers load as they load any other, without pickles."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rwp.runs.files import replacing_folder

if TYPE_CHECKING:
    from torch import nn


def save_model(
    model: "nn.Module",
    folder: str | os.PathLike[str],
    *,
    label_names: Sequence[str],
    data_config: Mapping[str, Any],
    model_args: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
) -> None:
    """Write a timm model's weights (safetensors) and config.json, in place of what `folder` held, whole or not at all.

    `timm.create_model("local-dir:FOLDER", pretrained=True)`, `AutoModelForImageClassification.from_pretrained(FOLDER)`
    and `pipeline("image-classification", FOLDER)` then give the same logits for the same image.

    label_names: the classes' names, by index. data_config: the preprocessing it was evaluated with, as
    `timm.data.resolve_data_config` gives. model_args: the arguments of `timm.create_model` beside the classes. weights:
    in place of the model's own, by the names of its `state_dict`.
    """
    from safetensors.torch import save_file
    from timm.models import _hub as timm_hub

    source: Any = model.pretrained_cfg
    # What timm knows of its own weights, and its recommendations for testing them, are not true of these.
    others = dict.fromkeys(("tag", "license", "origin_url", "paper_ids", "notes", "description"))
    others |= dict.fromkeys(("test_input_size", "test_crop_pct", "pool_size"))
    of_ours: Any = {**source, **others, **data_config, "num_classes": len(label_names)}
    state = model.state_dict() if weights is None else weights
    plain = {name: tensor.cpu().contiguous() for name, tensor in state.items()}  # not channels_last
    with _replacing_model(Path(folder)) as partial:
        save_file(plain, partial / "model.safetensors", metadata={"format": "pt"})
        config_file = partial / "config.json"
        try:
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
        # transformers passes model_args on beside the number of classes, and timm knows that only from num_classes.
        (config.get("model_args") or {}).pop("num_classes", None)
        config_file.write_text(json.dumps(config, indent=2))


def save_any(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """`save_model` for timm's models, transformers' `TimmWrapper` too; else `save_pretrained`, or only the weights.

    Where a mesh of processes holds the weights together (FSDP2, tensor parallelism), all processes call it: the weights
    are gathered, and the first process writes them.

    Returns the facts that the model itself tells: library and architecture.
    """
    from hf_rwp.runs.sharded import is_sharded_model, whole_weights  # torch: a push by itself needs none

    model = _unwrapped(model)
    names = [*getattr(getattr(model, "config", None), "id2label", {}).values()]
    trained = getattr(getattr(model, "config", None), "pretrained_cfg", None) or {}
    arguments = getattr(getattr(model, "config", None), "model_args", None)
    sharded, writes = is_sharded_model(model), writes_here(model)
    if not hasattr(model, "get_base_model"):  # PEFT's models pass on every attribute
        model = getattr(model, "timm_model", model)
    weights = whole_weights(model, writes) if sharded else None
    if not hasattr(model, "get_base_model") and hasattr(model, "pretrained_cfg"):
        from timm.data.config import resolve_data_config

        config = {**model.pretrained_cfg, **trained}
        classes = range(getattr(model, "num_classes", 0))
        if label_names is not None and len(label_names) != len(classes):
            raise ValueError(f"{len(label_names)} label_names for a model of {len(classes)} classes: give one for each")
        known = [list(label_names or ()), names, config.get("label_names") or (), [str(label) for label in classes]]
        label_names = next(some for some in known if len(some) == len(classes))
        how: dict[str, Any] = {"data_config": data_config or resolve_data_config({}, pretrained_cfg=config)}
        how |= {"model_args": model_args or arguments, "weights": weights}
        if writes:
            save_model(model, folder, label_names=label_names, **how)
        return {"library": "timm", "architecture": config.get("architecture") or class_name(model)}
    adapted = hasattr(model, "get_base_model")
    library = "peft" if adapted else "transformers" if hasattr(model, "save_pretrained") else "pytorch"
    if writes:
        with _replacing_model(Path(folder)) as partial:
            if library == "pytorch":
                from safetensors.torch import save_file
                from safetensors.torch import save_model as save_weights

                file = str(partial / "model.safetensors")
                if weights is None and any(own.untyped_storage().nbytes() > own.nbytes for own in model.parameters()):
                    weights = {name: value.clone() for name, value in model.state_dict().items()}  # ZeRO's one buffer
                save_weights(model, file) if weights is None else save_file(weights, file)
            else:
                _save_pretrained(model, partial, weights)
    return {"library": library, "architecture": class_name(model.get_base_model() if adapted else model)}


def writes_here(model: Any) -> bool:
    """Whether this process is to write the model: where a mesh of processes holds the weights, the first one."""
    import torch.distributed as dist

    from hf_rwp.runs.sharded import is_sharded_model

    return not is_sharded_model(_unwrapped(model)) or dist.get_rank() == 0


def _save_pretrained(model: Any, folder: Path, weights: Mapping[str, Any] | None) -> None:
    """weights: the model's, whole; None where it holds them itself."""
    if weights is None:
        model.save_pretrained(folder)
        return
    config: Any = getattr(model, "config", None)
    loaded_in_parts = getattr(config, "distributed_config", None)
    if loaded_in_parts is not None:  # transformers would gather once more, on all processes
        config.distributed_config = None
    try:
        model.save_pretrained(folder, state_dict=dict(weights))
    finally:
        if loaded_in_parts is not None:
            config.distributed_config = loaded_in_parts


def class_name(model: Any) -> str:
    """The name of a model's class, as it was before fully_shard made another one of it."""
    kind = type(model)
    return (kind.__bases__[-1] if kind.__bases__[0].__name__ == "FSDPModule" else kind).__name__


def _unwrapped(model: Any) -> Any:
    """The model inside of DistributedDataParallel and torch.compile."""
    for name in ("module", "_orig_mod", "module"):
        inner = getattr(model, name, None)
        model = inner if hasattr(inner, "state_dict") else model
    return model


@contextmanager
def _replacing_model(folder: Path) -> Iterator[Path]:
    """`replacing_folder`, and FileExistsError where `folder` holds something other than an earlier model."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    written = any(path.suffix in (".safetensors", ".bin") for path in found)
    foreign = [path.name for path in found if path.is_dir() and path.name not in ("logs", ".eval_results")]
    if found and (foreign or not written):
        raise FileExistsError(
            f"{folder} holds {(foreign or [found[0].name])[0]}, which is not part of a model, and would be replaced: "
            "choose another folder"
        )
    with replacing_folder(folder) as partial:
        yield partial
