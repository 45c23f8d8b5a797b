"""Names that timm has, of models, optimizers and schedules, and those that are similar to one that it does not have."""

import difflib
from collections import Counter
from typing import Any

import timm
import torch
from timm.optim import list_optimizers  # type: ignore[attr-defined]
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]

from hf_rwp.images.timm_files import nearest, no_model, similar, told

SCHEDULES = ("cosine", "constant", "step", "multistep", "poly", "tanh", "wsd", "rsqrt", "none")  # timm lists none


def is_model(name: str) -> bool:
    """Whether timm has a model of that name."""
    return bool(timm.is_model(name))


def check_model(flag: str, name: str) -> None:
    """Raise ValueError for a model, or weights of it, that timm does not have; with a `:` it is from elsewhere."""
    if ":" not in name and not is_model(name):
        raise ValueError(no_model(flag, name, similar_models(name)))
    check_tag(flag, name)


def check_tag(flag: str, name: str) -> None:
    """Raise ValueError for one of timm's models with a tag that it has no weights of: `resnet50.a1_in1k`."""
    known = (
        timm.list_models(f"{name.split('.')[0]}.*", include_tags=True) if "." in name and ":" not in name else [name]
    )
    if name not in known:
        raise ValueError(f"{flag}={name!r}: timm has no such weights of it. It has {', '.join(known) or 'none'}")


def check_optimizer(name: str) -> None:
    """Raise ValueError for an optimizer that timm does not have."""
    bare, known = name.removeprefix("lookahead_"), [str(one) for one in list_optimizers()]
    if bare not in known:
        raise ValueError(f"opt must be one of timm's optimizers, got {name!r}{told(similar(bare, known))}")


def check_schedule(name: str, **options: Any) -> None:
    """Raise ValueError for a schedule of the learning rate that timm does not have, and for options that it refuses.

    options: of `create_scheduler_v2`, but those that take the number of updates.
    """
    if name not in (known := [one for one in SCHEDULES if _has_schedule(one)]) and not _has_schedule(name):
        meant = difflib.get_close_matches(name.lower(), known, 1)
        raise ValueError(f"sched must be one of {', '.join(known)}, got {name!r}" + (told(meant) if meant else ""))
    try:
        _made(name, **options)
    except ValueError as error:
        raise ValueError(f"sched={name!r} cannot be with these flags: {error}") from error


def similar_models(name: str) -> list[str]:
    """Up to five of timm's models that are named like `name`."""
    stem = name.split(".")[0].lower()
    weights = Counter(one.split(".")[0] for one in timm.list_pretrained(f"{stem}*")) if stem else Counter[str]()
    return nearest(stem, timm.list_models(), weights)


def _has_schedule(name: str) -> bool:
    try:
        _made(name)
    except ValueError:
        return False
    return True


def _made(name: str, **options: Any) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    settings = {"num_epochs": 10, "warmup_epochs": 1, **options}
    create_scheduler_v2(optimizer, sched=name, step_on_epochs=False, updates_per_epoch=1000, **settings)
