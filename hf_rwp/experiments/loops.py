"""A training loop as in timm's train.py, to set imagenet_rwp.py's beside."""

import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.data import create_loader, resolve_data_config  # type: ignore[attr-defined]
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from timm.utils import AverageMeter  # type: ignore[attr-defined]
from torch.nn.functional import cross_entropy

# Where loading is most of the work.
LOOP: dict[str, Any] = {"model": "test_resnet", "img_size": 32, "batch_size": 64}


class Rows(torch.utils.data.Dataset[Any]):
    """Images and labels as timm's reader of datasets takes them: one by one."""

    transform: Callable[[Any], Any]  # timm's create_loader sets it

    def __init__(self, split: Any) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.split[index]
        return self.transform(row["image"].convert("RGB")), row["label"]


def timm_loop(split: Any, workers: int) -> float:
    """Images per second of the second epoch, as timm's train.py trains."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(LOOP["model"], num_classes=split.features["label"].num_classes).to(device)
    config = resolve_data_config({"img_size": LOOP["img_size"]}, model=model)
    images: Any = Rows(split.cast_column("image", type(split.features["image"])()))  # which decodes
    loader: Any = create_loader(
        images,
        input_size=config["input_size"],
        batch_size=LOOP["batch_size"],
        is_training=True,
        scale=(0.08, 1.0),
        hflip=0.5,
        color_jitter=0.4,
        interpolation="bilinear",
        mean=config["mean"],
        std=config["std"],
        num_workers=workers,
        device=device,
        persistent_workers=workers > 0,
    )
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, weight_decay=5e-4, momentum=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=2, step_on_epochs=False, updates_per_epoch=len(loader))
    losses, updates = AverageMeter(), 0
    for _ in range(2):
        seen, start = 0, time.perf_counter()
        for batch, labels in loader:
            loss = cross_entropy(model(batch), labels)
            losses.update(loss.item(), len(batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen, updates = seen + len(batch), updates + 1
            scheduler.step_update(num_updates=updates, metric=losses.avg)
        seconds = time.perf_counter() - start
    return seen / seconds
