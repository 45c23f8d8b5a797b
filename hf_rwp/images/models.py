"""timm's model, optimizer, schedule, clipping and Mixup from the flags of `TimmArguments`."""

import copy
import logging
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError
from timm.data.mixup import Mixup
from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]
from timm.models import load_state_dict, model_parameters
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from timm.utils import dispatch_clip_grad  # type: ignore[attr-defined]
from torch import nn

from hf_rwp.core.placement import mixes, role
from hf_rwp.images.arguments import TimmArguments
from hf_rwp.images.names import check_tag
from hf_rwp.images.weights import find_weights

logger = logging.getLogger(__name__)


def create_model(
    args: TimmArguments, label_names: Sequence[str], img_size: int | None = None, new_head: bool = True
) -> tuple[Any, dict[str, Any]]:
    """The model, and the arguments that make it again, beside the classes.

    img_size: of a side, in pixels; None is the model's own. new_head: whether weights for other classes get one.
    Raises ValueError for weights that cannot be loaded, for an unknown model, argument or size and,
    without new_head, for weights of other classes.
    """
    check_tag("model", args.model)
    model_args = check_model_kwargs(yaml.safe_load(args.model_kwargs))
    rates = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    options = {name: rate for name, rate in rates.items() if rate is not None} | model_args
    named = args.pretrained not in (None, "timm")
    source = find_weights(str(args.pretrained), "pretrained") if named else None
    if source is not None and source.is_file:
        model: Any = _from_file(args.model, source.path, len(label_names), new_head, options)
    elif source is not None and source.path and source.config.get("model_type") == "timm_wrapper":
        model = _from_wrapper(source.path, source.config, label_names, new_head, options)
    else:
        if source is not None and source.library == "transformers":
            taken = (
                "lora_rwp.py trains it, and gamma.py takes it with --text_file"
                if source.kind.endswith(("ForCausalLM", "LMHeadModel"))
                else "vit_rwp.py takes it, as --model_name_or_path"
            )
            raise ValueError(
                f"pretrained={args.pretrained!r} is a model of transformers ({source.kind}), and this recipe takes "
                f"timm's: {taken}"
            )
        name = (
            args.model if source is None else f"local-dir:{source.path}" if source.path else f"hf-hub:{source.hub_id}"
        )
        model = _created(name, args.pretrained, {"num_classes": len(label_names), **options})
    config = model.pretrained_cfg
    names, count = config.get("label_names") or label_names, config["num_classes"]
    if args.pretrained and (count != len(label_names) or names != label_names):
        if not new_head:
            pairs = enumerate(zip(names, label_names, strict=False))
            first = next((f"; class {index} is {a!r} there and {b!r} here" for index, (a, b) in pairs if a != b), "")
            raise ValueError(
                f"{args.pretrained} has {count} classes, but the data has {len(label_names)}{first}. An evaluation "
                "needs the classes that the weights were trained for, in the same order"
            )
        model.reset_classifier(len(label_names))  # as many as before may still be others
    if img_size and config.get("fixed_input_size") and "img_size" not in model_args:
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=img_size)
            model_args["img_size"] = img_size
        elif tuple(config["input_size"][1:]) != (img_size, img_size):
            raise ValueError(
                f"model={args.model!r} takes images of {config['input_size'][1]} pixels: set img_size to that, or give "
                "another size in model_kwargs, {img_size: ...}, if timm's model has such an argument"
            )
    return model, model_args


_NOT_ARGUMENTS = {
    "num_classes": "the classes are those of the data",
    "num_labels": "the classes are those of the data",
    "in_chans": "images are read in RGB, gray ones too, in training and by those who use the model: leave it at 3",
    "num_channels": "images are read in RGB, gray ones too, in training and by those who use the model: leave it at 3",
    "pretrained": "that is a flag of its own",
}


def check_model_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`model_kwargs`, once nothing in it contradicts the data. Raises ValueError."""
    for name, reason in _NOT_ARGUMENTS.items():
        if name in kwargs and (kwargs[name] != 3 or "RGB" not in reason):
            raise ValueError(f"model_kwargs has {name}={kwargs[name]!r}: {reason}")
    return kwargs


def refuse_single_images(model: nn.Module, size: Sequence[int], batch_size: int, parts: int) -> None:
    """Raise ValueError where the parts of a batch are single images, and BatchNorm would find one value of a channel.

    size: of an image, (3, H, W). parts: that a batch is cut into.
    """
    if batch_size > parts:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(model).train()(torch.zeros(1, *size, device=next(model.parameters()).device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        cut = (
            "halved, for a clean and a perturbed gradient, into parts of"
            if parts == 2
            else f"cut into {parts} parts of"
        )
        raise ValueError(
            f"batch_size={batch_size} is {cut if parts > 1 else 'only'} one image, and BatchNorm needs more than one "
            f"value of a channel, where this model's features are 1x1: set batch_size to at least {2 * parts}"
        ) from None


def _created(name: str, pretrained: str | None, options: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained is not None, **options)
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None or found[1] not in options:
            raise
        raise ValueError(f"model_kwargs has {found[1]!r}, which {name} does not take: leave it out") from error
    except KeyError as error:
        raise ValueError(
            f"pretrained={pretrained!r} holds no model of timm's, whose config.json has {error}: vit_rwp.py takes "
            "those of transformers, as --model_name_or_path"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        if pretrained is None:
            raise
        here = "" if "local-dir:" in name or pretrained == "timm" else "it is not a folder here, and on the Hub: "
        raise ValueError(
            f"pretrained={pretrained!r} could not be loaded as {name}: {here}{error}. Set a folder that holds a model, "
            "or an id on the Hub, and check the connection and your access (`hf auth login`)"
        ) from error


def _from_wrapper(
    folder: Path, config: dict[str, Any], label_names: Sequence[str], new_head: bool, options: dict[str, Any]
) -> Any:
    """A timm model that transformers' wrapper saved, whose configuration timm does not read."""
    arguments = {name: value for name, value in (config.get("model_args") or {}).items() if name != "num_classes"}
    names = config.get("label_names")
    model = _from_file(
        config["architecture"],
        folder / "model.safetensors",
        len(label_names),
        new_head and names != list(label_names),
        arguments | options,
        named=True,
    )
    model.pretrained_cfg |= {**(config.get("pretrained_cfg") or {}), "num_classes": len(label_names)}
    model.pretrained_cfg["label_names"] = list(label_names) if new_head else names
    return model


def _from_file(name: str, file: Any, classes: int, new_head: bool, options: dict[str, Any], named: bool = False) -> Any:
    """A timm model with the weights in a file, which says neither its model nor its classes. named: but for these."""
    head = _created(name, None, options).pretrained_cfg["classifier"]
    try:
        # transformers' wrapper of a timm model says so in each name
        weights = {key.removeprefix("timm_model."): value for key, value in load_state_dict(str(file)).items()}
        size = weights[f"{head if isinstance(head, str) else head[0]}.weight"].shape[0]
    except KeyError:
        size = 0  # without a head
    except (OSError, RuntimeError, ValueError, AttributeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"pretrained={str(file)!r} holds no weights that can be read: {error}") from error
    if not new_head and size != classes:
        raise ValueError(
            f"{file} has {size} classes, but the data has {classes}. An evaluation needs the classes that the weights "
            "were trained for, in the same order"
        )
    if not new_head and not named:
        logger.warning("%s does not name its classes: taken to be those of the data, in the same order", file)
    try:
        model: Any = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": weights, "num_classes": size},
            **{**options, "num_classes": size},
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{file} does not fit model={name!r} ({' '.join(str(error).split())[:200]} ...): set --model to the one "
            "that the weights are of, with its model_kwargs"
        ) from error
    if new_head:
        model.reset_classifier(classes)
    known = {name: value for name, value in model.pretrained_cfg.items() if name != "state_dict"}
    model.pretrained_cfg = {**known, "num_classes": classes}
    return model


def timm_id(module: Any) -> str:
    """Where on the Hub timm has the weights of `--pretrained` without a value."""
    config = module.pretrained_cfg
    named = "timm/" + ".".join(filter(None, (config["architecture"], config.get("tag"))))
    return config.get("hf_hub_id") or named


def create_optimizer(args: TimmArguments, module: nn.Module) -> torch.optim.Optimizer:
    own: dict[str, Any] = {"eps": args.opt_eps, "betas": args.opt_betas}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        module,
        opt=args.opt,
        lr=args.lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        filter_bias_and_bn=not args.weight_decay_1d,
        layer_decay=args.layer_decay,
        **{name: value for name, value in own.items() if value is not None},
    )
    return optimizer


def create_scheduler(args: TimmArguments, optimizer: Any, updates: int) -> tuple[Any, int]:
    """timm's schedule per update, None for a constant rate, and how many epochs it lasts. updates: of an epoch."""
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched=args.sched, step_on_epochs=False, updates_per_epoch=updates, **args.schedule_options
    )
    return scheduler, epochs


def clip_gradients(args: TimmArguments, unscale: Callable[[], object], module: nn.Module) -> None:
    """Clip as the flags say, ahead of a step. unscale: undoes what a GradScaler did, if there is one."""
    if args.clip_grad:
        unscale()
        clipped = model_parameters(module, exclude_head=args.clip_mode == "agc")
        dispatch_clip_grad(clipped, args.clip_grad, args.clip_mode)


def create_mixup(args: TimmArguments, num_classes: int) -> Mixup | None:
    """timm's Mixup and CutMix; None without either."""
    if not (args.mixup or args.cutmix):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def sync_bn(module: nn.Module, device: torch.device, replica: int, replicas: int, alpha: float) -> nn.Module:
    """`module` with SyncBatchNorm over the replicas of this one's role, over all of them where `alpha` mixes none.

    Raises ValueError on a CPU. Collective.
    """
    if device.type == "cpu":
        raise ValueError("sync_bn needs GPUs: PyTorch's SyncBatchNorm does not run on CPUs")
    if replicas == 1:
        return module
    roles = [mixes(alpha) and role(index, 0, replicas, 1, alpha).perturbed for index in range(replicas)]
    # Every process must make every group.
    groups = {kind: dist.new_group([i for i in range(replicas) if roles[i] is kind]) for kind in sorted(set(roles))}
    converted: nn.Module = convert_sync_batchnorm(module, groups[roles[replica]])
    return converted
