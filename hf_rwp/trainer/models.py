"""Models for images that Trainer trains: made or loaded for the classes of the data, given LoRA, and saved whole."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import timm
import torch
import yaml
from timm.data.config import resolve_data_config
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_rwp.hub.export import save_model
from hf_rwp.images.found import listed
from hf_rwp.runs.files import replacing_folder
from hf_rwp.trainer.model_arguments import ModelArguments

# The small ViT that is trained where no model is named, on 32 pixels: 16 patches, 0.3 million parameters. At the usual
# initializer_range, 0.02, such narrow layers hardly learn.
SMALL_VIT = {
    "patch_size": 8,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "initializer_range": 0.1,
}


def create_model(args: ModelArguments, label_names: Sequence[str]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and the arguments that make it again in timm, beside the classes.

    Raises ValueError for weights that cannot be loaded or do not fit.
    """
    kwargs = yaml.safe_load(args.model_kwargs)
    names = dict(enumerate(label_names))
    classes: dict[str, Any] = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    classes["problem_type"] = "single_label_classification"
    if args.model_name_or_path is None:
        check_known(ViTConfig(), kwargs)
        small = {**SMALL_VIT, "image_size": args.img_size, **kwargs}
        return ViTForImageClassification(ViTConfig(**small, **classes)), {}
    if args.weights is None:
        name = args.model_name_or_path
        if args.img_size and timm.get_pretrained_cfg_value(name, "fixed_input_size"):
            kwargs["img_size"] = args.img_size
        config = TimmWrapperConfig(architecture=name, model_args=kwargs or None, **classes)
        try:
            model: PreTrainedModel = TimmWrapperForImageClassification(config)
        except TypeError as error:
            raise ValueError(f"model_kwargs={args.model_kwargs!r}, which {name} does not take: {error}") from error
    else:
        model = load_weights(args, classes, kwargs)
    inner = timm_model_of(model)
    if inner is None:
        size = getattr(model.config, "image_size", None)
        if args.img_size and size and args.img_size != size:
            raise ValueError(
                f"img_size={args.img_size}, and the position embeddings of {args.weights} are for {size} pixels: leave "
                "img_size out, or take the model from timm (timm/...), which resizes them"
            )
        return model, {}
    kwargs = dict(model.config.model_args or {})
    if args.weights and args.img_size and inner.pretrained_cfg.get("fixed_input_size"):
        inner.set_input_size(img_size=args.img_size)
        kwargs["img_size"] = args.img_size
        model.config.model_args = kwargs
    return model, kwargs


def load_weights(args: ModelArguments, classes: Mapping[str, Any], kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """The model with trained weights, and a new head where the classes differ; ValueError if more would be new."""
    weights: Any = args.weights
    with _told_by_name(weights):
        config = AutoConfig.from_pretrained(weights)
    if isinstance(config, TimmWrapperConfig):
        theirs = {name: value for name, value in (config.model_args or {}).items() if name != "num_classes"}
        kwargs = {"model_args": {**theirs, **kwargs} or None}
    else:
        check_known(config, kwargs)
    config.update({**classes, **kwargs})
    with _told_by_name(weights):
        model, loading = AutoModelForImageClassification.from_pretrained(
            weights,
            config=config,
            dtype=torch.float32,  # else that of the file
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    new = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    lost = sorted(key for key in new if not key.startswith(f"{head_of(model)}."))
    if lost:
        raise ValueError(
            f"{args.weights} does not fit the model, which would have random weights beside a new head: "
            f"{listed(lost, 5)}. Leave out model_kwargs, or take other weights"
        )
    if args.eval_only and new and not args.of_checkpoint:
        raise ValueError(
            f"{args.weights} has no head for the {len(classes['id2label'])} classes of the data: eval_only needs the "
            "data that the weights were trained for"
        )
    loaded: PreTrainedModel = model
    return loaded


@contextmanager
def _told_by_name(weights: str) -> Iterator[None]:
    """Errors of loading them as ValueError that says what was loaded, and what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={weights!r} could not be loaded: {error}. Set a folder that holds a model, or an id "
            "on the Hub, and check the connection and your access (`hf auth login`)"
        ) from error


def check_known(config: PretrainedConfig, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that transformers' configuration does not have, and would keep without a word."""
    known = config.to_dict().keys()
    for name in kwargs:
        if name not in known:
            similar = ", ".join(difflib.get_close_matches(name, known, n=3)) or listed(sorted(known), 3)
            raise ValueError(
                f"model_kwargs has {name!r}, which {type(config).__name__} does not have: it has {similar}"
            )


def unwrapped(model: Any) -> nn.Module:
    """The model that LoRA was put on, LoRA's layers in it."""
    inner: nn.Module = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    return inner


def timm_model_of(model: nn.Module) -> Any:
    """The timm model inside transformers' wrapper of it, LoRA or not; None for transformers' own models."""
    inner = unwrapped(model)
    return inner.timm_model if isinstance(inner, TimmWrapperForImageClassification) else None


def head_of(model: PreTrainedModel) -> str:
    """The name of the model's classifier."""
    inner = timm_model_of(model)
    if inner is not None:
        head = inner.get_classifier()
        name: str = next(name for name, module in model.named_modules() if module is head)
        return name
    names = [name for name in ("classifier", "head") if hasattr(model, name)]
    if not names:
        raise NotImplementedError(
            f"{type(model).__name__} has no layer called classifier or head: a model like ViTForImageClassification, "
            "or one of timm's, is needed"
        )
    return names[0]


def add_lora(args: ModelArguments, model: PreTrainedModel) -> nn.Module:
    """LoRA on every linear layer but the head, which is trained whole."""
    from peft import LoraConfig, get_peft_model

    head = head_of(model)
    rank: Any = args.lora_r
    scale: Any = args.lora_alpha or rank
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(
        r=rank,
        lora_alpha=scale,
        lora_dropout=args.lora_dropout,
        target_modules=[name for name in targets if not f"{name}.".startswith(f"{head}.")],
        modules_to_save=[head],
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def preprocessing(args: ModelArguments, model: PreTrainedModel) -> dict[str, Any]:
    """What is done to an image ahead of the model: its own way, where no flag says otherwise; as timm writes it."""
    chosen = {"img_size": args.img_size, "crop_pct": args.crop_pct, "interpolation": args.interpolation}
    inner = timm_model_of(model)
    if inner is not None:
        trained = getattr(model.config, "pretrained_cfg", None) or {}
        return {**resolve_data_config(chosen, pretrained_cfg={**inner.pretrained_cfg, **trained})}
    own: Any = ViTImageProcessor()
    if args.weights:
        try:
            own = AutoImageProcessor.from_pretrained(args.weights)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{args.weights} does not say how its images are prepared ({error}): it needs a "
                "preprocessor_config.json, as ViTImageProcessor().save_pretrained writes"
            ) from error
    size, crop = dict(own.size), dict(getattr(own, "crop_size", None) or {})
    side = args.img_size or getattr(model.config, "image_size", None) or crop.get("height") or size.get("height")
    cropped = bool(getattr(own, "do_center_crop", None)) and "shortest_edge" in size
    config = {
        "input_size": (3, side, side),
        "mean": tuple(own.image_mean),
        "std": tuple(own.image_std),
        "interpolation": PIL.Image.Resampling(own.resample).name.lower(),
        # Without a crop, transformers squashes the image into a square.
        "crop_pct": side / size["shortest_edge"] if cropped else 1.0,
        "crop_mode": "center" if cropped or args.crop_pct else "squash",
    }
    return config | {name: value for name, value in chosen.items() if value is not None and name != "img_size"}


def image_processor(data_config: Mapping[str, Any]) -> ViTImageProcessor:
    """transformers' preprocessing, the same as the evaluation's. data_config: as `preprocessing` gives."""
    side = data_config["input_size"][-1]
    square = {"height": side, "width": side}
    cropped = data_config["crop_mode"] != "squash"
    crop = {"size": {"shortest_edge": math.floor(side / data_config["crop_pct"])}, "do_center_crop": True}
    return ViTImageProcessor(
        **(crop | {"crop_size": square} if cropped else {"size": square}),
        image_mean=list(data_config["mean"]),
        image_std=list(data_config["std"]),
        resample=PIL.Image.Resampling[data_config["interpolation"].upper()],
    )


def save_whole(
    model: PreTrainedModel,
    folder: Path,
    label_names: Sequence[str],
    data_config: Mapping[str, Any],
    model_args: Mapping[str, Any],
) -> None:
    """The model with preprocessing and label names, in a folder that transformers loads; timm too, if it is timm's."""
    inner = timm_model_of(model)
    if inner is not None:
        save_model(inner, folder, label_names=label_names, data_config=data_config, model_args=model_args)
        return
    with replacing_folder(folder) as partial:
        model.save_pretrained(partial)
        image_processor(data_config).save_pretrained(partial)
