"""timm's model, optimizer, schedule and Mixup from the flags of `TimmArguments`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import yaml
from timm.data.mixup import Mixup
from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from torch import nn

from hf_rwp.core.placement import mixes, role
from hf_rwp.images.arguments import TimmArguments


def create_model(
    args: TimmArguments, label_names: Sequence[str], img_size: int | None = None, new_head: bool = True
) -> tuple[Any, dict[str, Any]]:
    """The model, and the arguments that make it again, beside the classes.

    img_size: of a side, in pixels; None is the model's own. new_head: whether weights for other classes get one.
    Raises ValueError for weights that cannot be loaded, for a size that the model does not take and, without new_head,
    for weights of other classes.
    """
    model_args = yaml.safe_load(args.model_kwargs)
    rates = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    options = {name: rate for name, rate in rates.items() if rate is not None} | model_args
    name = _address(args.pretrained) if args.pretrained not in (None, "timm") else args.model
    try:
        model: Any = timm.create_model(
            name, pretrained=args.pretrained is not None, **{"num_classes": len(label_names), **options}
        )
    except (OSError, RuntimeError, ValueError) as error:
        if args.pretrained is None:
            raise
        raise ValueError(
            f"pretrained={args.pretrained!r} could not be loaded as {name}: {error}. Set a folder that holds a model, "
            "or an id on the Hub, and check the connection and your access (`hf auth login`)"
        ) from error
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
    milestones: Any = {"decay_milestones": args.decay_milestones} if args.decay_milestones else {}
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        decay_epochs=args.decay_epochs,  # type: ignore[arg-type]
        cooldown_epochs=args.cooldown_epochs,
        decay_rate=args.decay_rate,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates,
        **milestones,
    )
    return scheduler, epochs


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


def _address(pretrained: str | None) -> str:
    """A folder or an id on the Hub as timm.create_model takes it."""
    return f"{'local-dir' if Path(str(pretrained)).is_dir() else 'hf-hub'}:{pretrained}"
