"""Trainer on images: the order of the rows, Mixup and CutMix of one gradient's images, and the figures of a split."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers import EvalPrediction, PreTrainedModel

from hf_rwp.core.placement import mixes
from hf_rwp.images.loaders import BatchPlan
from hf_rwp.images.metrics import Confusion, label_rank, predicted_class, refuse_nothing_read
from hf_rwp.images.top_k import Top1, Top5
from hf_rwp.runs.distributed_checkpoints import is_sharded_checkpoint, load_weights
from hf_rwp.runs.sharded import is_sharded_model
from hf_rwp.trainer.trainer import RWPTrainer


class ShuffledRows(torch.utils.data.Sampler[Any]):
    """The rows of an `ImageDataset` in an order of (seed, epoch), as keys that seed the augmentation of each batch.

    A resumed run meets the same images, whatever was loaded ahead of the checkpoint. together: as many rows as this
    divides, those that are left over are left out.
    """

    def __init__(self, size: int, seed: int, together: int = 1) -> None:
        self.plan = BatchPlan(size, batch_size=together, training=True, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        self.plan.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.plan) * self.plan.batch_size

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self.plan)


class ImageTrainer(RWPTrainer):
    """RWPTrainer for an `ImageDataset`, with timm's Mixup and CutMix.

    Mixing happens in `compute_loss`, which sees one micro-step's images: RWP's two gradients share none. As pairs are
    mixed, and an epoch's last batch may be odd, that is left out then.
    """

    mixup: Mixup | None = None
    rows: ShuffledRows | None = None  # the order of the training images
    noise: Mapping[str, Any] = {}  # of `RWP.report`, as `Record` last noted it
    _losses_taken: tuple[Any, int] = (0.0, 0)  # the sum of this process's steps' losses, and how many

    def mix(self, num_classes: int) -> None:
        """Mix from now on, if the arguments say so. Raises ValueError for a batch that does not make pairs."""
        args = self.args
        if not (args.mixup or args.cutmix):
            return
        mixed = args.rwp and mixes(args.rwp_alpha, args.rwp_gamma)
        halved = mixed and args.world_size == args.gradient_accumulation_steps == 1
        if args.train_batch_size % (4 if halved else 2):
            raise ValueError(
                f"per_device_train_batch_size={args.per_device_train_batch_size}: Mixup and CutMix mix pairs"
                + (" of each of the two halves that RWP needs" if halved else "")
                + f". Set a multiple of {4 if halved else 2}"
            )
        self.mixup = Mixup(
            args.mixup, args.cutmix, label_smoothing=args.label_smoothing_factor, num_classes=num_classes
        )
        self.model_accepts_loss_kwargs = False  # the loss below is a mean over its batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        together = self.args.train_batch_size * self.args.world_size if self.mixup else 1
        images: Any = self.train_dataset
        self.rows = ShuffledRows(len(images), seed, together)
        return self.rows

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        total, steps = self._losses_taken
        self._losses_taken = total, steps + 1  # it is called once a step
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss, (total, steps) = super().training_step(*args, **kwargs), self._losses_taken
        self._losses_taken = total + loss.detach(), steps
        return loss

    def take_losses(self) -> tuple[float, int]:
        """The mean loss of this process's steps since the last call, and how many these were."""
        (total, steps), self._losses_taken = self._losses_taken, (0.0, 0)
        return (float(total) / steps if steps else 0.0), steps

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.rwp is not None and {"loss", "learning_rate"} <= logs.keys():
            logs["gamma"] = max(group["rwp_gamma"] for group in self.rwp.param_groups)
            logs |= {f"noise_size_{which}": layer["size"] for which, layer in self.noise.items()}
        super().log(logs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The cross-entropy with mixed targets in training, Trainer's loss otherwise: the place for another loss."""
        if self.mixup is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        images, targets = self.mixup(inputs["pixel_values"], inputs["labels"])
        logits = model(pixel_values=images).logits
        return -(targets * log_softmax(logits.float(), dim=1)).sum(1).mean()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Trainer's, with the figures by class as `eval_by_class`, and without a draw from the generator of training.

        Before or after such a draw a checkpoint may be made.
        """
        with torch.random.fork_rng(devices=[]):
            figures: dict[str, Any] = super().evaluate(*args, **kwargs)
        by_class, log = getattr(self.compute_metrics, "by_class", None), self.state.log_history
        if by_class and log:  # beside what Trainer logged, which is numbers, and of the last evaluation only
            for entry in log:
                entry.pop("eval_by_class", None)
            log[-1]["eval_by_class"] = figures["eval_by_class"] = by_class
        return figures

    def load_checkpoint(self, folder: Path) -> None:
        """Take a checkpoint's weights, LoRA's too, and nothing else of it."""
        self._load_from_checkpoint(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._restore(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._restore(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _restore(self, checkpoint: Any) -> bool:
        """Load a checkpoint's weights, unless they are LoRA's or a mesh holds the model's; whether it did.

        Trainer looks for the names that weights have in memory. A ViT's are saved under older ones, in checkpoints too:
        it would pass them over, with a warning (huggingface/transformers issue 43701).
        """
        if not isinstance(self.model, PreTrainedModel) or is_sharded_model(self.model):
            return False
        if is_sharded_checkpoint(Path(checkpoint)):
            load_weights(self.model, Path(checkpoint))
            return True
        saved = type(self.model).from_pretrained(checkpoint, config=copy.deepcopy(self.model.config))
        self.model.load_state_dict(saved.state_dict())
        return True


def collate(items: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """A batch for the model. The label -1 of an unreadable image becomes the one that losses ignore."""
    images, labels = zip(*items, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor([y if y >= 0 else -100 for y in labels])}


def ranks_and_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """What `EvaluationMetrics` needs of each image, (B, 3): how many classes are ahead of its label, the cross-entropy,
    and the class that it is taken for.

    logits: (B, C). labels: (B,); of one below 0 these mean nothing.
    """
    known, logits = labels.clamp(min=0), logits.float()
    losses = cross_entropy(logits, known, reduction="none")
    return torch.stack([label_rank(logits, known).float(), losses, predicted_class(logits).float()], 1)


class EvaluationMetrics:
    """Trainer's `compute_metrics`, over what `ranks_and_losses` made of logits: top1, top5 and loss.

    label_names: of the classes; `by_class` are then the figures of each, of the last evaluation. No top5 for up to five
    of them, of which it is 1 always.
    """

    def __init__(self, label_names: Sequence[str] = ()) -> None:
        few = 0 < len(label_names) <= 5
        self._metrics: tuple[Top1 | Top5, ...] = (Top1(),) if few else (Top1(), Top5())
        self._losses: list[Tensor] = []
        self._confusion = Confusion(label_names)
        self.by_class: dict[str, Any] = {}

    def __call__(self, predicted: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """compute_result: Trainer's, for `--batch_eval_metrics`. Raises ValueError where no image could be read."""
        scored, labels = (torch.as_tensor(part).cpu() for part in (predicted.predictions, predicted.label_ids))
        ranks, losses, classes = scored[labels >= 0].unbind(1)
        self._confusion.add(classes, labels[labels >= 0])
        if len(losses):
            self._losses.append(losses.double())
            for metric in self._metrics:
                metric.add_batch(predictions=ranks.long(), references=labels[labels >= 0])
        if not compute_result:
            return {}
        refuse_nothing_read(sum(map(len, self._losses)))
        figures = {name: value for metric in self._metrics for name, value in (metric.compute() or {}).items()}
        figures["loss"] = torch.cat(self._losses).mean().item()
        self._losses = []
        self.by_class = self._confusion.by_class()
        return figures
