"""What the tests of RWPTrainer share: small models, a Trainer on a CPU, a watcher of what a run did, and the paper.

`Watch` records every pass in training (its inputs, and the noise on the weights that it saw) and every optimizer step
(the clean weights, and the gradient). `paper` is the mixed gradient, in float64, from what was recorded.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from reference import noises, snapshot
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_rwp import RWPTrainer, RWPTrainingArguments
from hf_rwp.trainer.trainer import RWPTrainerMixin

Tensors = dict[str, Tensor]
LOUD = {"rwp": True, "rwp_gamma": 0.2}  # no gradient at clean weights passes for one at perturbed weights
WORDS, TAGS = 11, 4


class Tagger(nn.Module):
    """Tags words, in float64. counts: whether its loss is one over all tags of the step, else over the batch's own."""

    config = None  # label smoothing asks for one

    def __init__(self, counts: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.accepts_loss_kwargs = counts
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words = nn.Embedding(WORDS, 6)
            self.head = nn.Linear(6, TAGS)
        self.to(dtype)

    def forward(self, ids: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None) -> dict[str, Tensor]:
        logits = self.head(self.words(ids).tanh())
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        return {"loss": loss / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)}


def tags(ids: Tensor) -> Tensor:
    """Every word's tag, -100 where it has none: a different number in every sentence."""
    return (ids * 7 % TAGS).where((ids + ids[..., :1]) % 3 > 0, -100)


def sentences(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    rows = torch.randint(WORDS, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"ids": ids, "labels": tags(ids)} for ids in rows]


class Classifier(nn.Module):
    """timm's test_resnet, with BatchNorm, as Trainer likes a model; its loss is a mean over the batch."""

    accepts_loss_kwargs = False

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = timm.create_model("test_resnet", num_classes=3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def images(count: int, size: int = 32) -> list[dict[str, Any]]:
    rows = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(rows)]


def make(
    model: nn.Module | None, folder: Any, kind: type[Trainer] = RWPTrainer, arguments: Any = None, **options: Any
) -> Trainer:
    """A quiet Trainer on a CPU. options: for the Trainer where it knows them, else for its arguments."""
    names = {"train_dataset", "eval_dataset", "data_collator", "callbacks", "optimizers", "compute_loss_func"}
    names |= {"model_init", "compute_metrics", "processing_class", "peft_config", "optimizer_cls_and_kwargs"}
    own = {name: options.pop(name) for name in names & options.keys()}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    quiet |= {"max_grad_norm": 0.0, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant"}
    quiet |= {"num_train_epochs": 1, "per_device_train_batch_size": 5}
    arguments = arguments or (RWPTrainingArguments if issubclass(kind, RWPTrainerMixin) else TrainingArguments)
    return kind(model, arguments(str(folder), **{**quiet, **options}), **own)


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def tensors(model: nn.Module) -> Tensors:
    """A copy of all that a checkpoint would hold, read without the help of `state_dict`."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def same(got: Tensors, expected: Tensors) -> bool:
    """Bit for bit."""
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


@dataclass
class Step:
    clean: Tensors
    gradient: Tensors
    slots: list[tuple[Tensors | None, dict[str, Tensor]]] = field(default_factory=list)  # (noise, inputs)

    @property
    def roles(self) -> list[bool]:
        return [noise is not None for noise, _ in self.slots]


class Watch(TrainerCallback):
    """What a run did, step by step."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._handles: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **_: Any) -> None:
        self._model = model
        self._passes: list[tuple[Tensors, dict[str, Tensor]]] = []
        while self._handles:  # an earlier training's
            self._handles.pop().remove()
        base = getattr(optimizer.optimizer, "base", optimizer.optimizer)
        self._handles.append(base.register_step_pre_hook(self._step))
        forward = torch.compiler.disable(self._forward)
        self._handles.append(model.register_forward_pre_hook(forward, with_kwargs=True))

    def _forward(self, module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            inputs = {name: value.clone() for name, value in kwargs.items() if isinstance(value, Tensor)}
            inputs.pop("num_items_in_batch", None)
            self._passes.append((snapshot(module), inputs))

    def _step(self, *_: Any) -> None:
        clean = snapshot(self._model)
        gradient = {name: p.grad.clone() for name, p in self._model.named_parameters() if p.grad is not None}
        eps = noises([seen for seen, _ in self._passes], clean)
        slots = [(noise, inputs) for noise, (_, inputs) in zip(eps, self._passes, strict=True)]
        self.steps.append(Step(clean, gradient, slots))
        self._passes = []


Loss = Callable[[Callable[..., Any], dict[str, Tensor]], tuple[Any, Any]]


def of_tags(call: Callable[..., Any], inputs: dict[str, Tensor]) -> tuple[Any, Any]:
    """The Tagger's loss summed over tags, and their number."""
    labels = tags(inputs["ids"])
    loss = F.cross_entropy(call(ids=inputs["ids"])["logits"].flatten(0, -2), labels.flatten(), reduction="sum")
    return loss, int((labels != -100).sum())


def paper(
    model: nn.Module, weights: Tensors, slots: list[Any], alpha: float, tokens: bool, loss: Loss = of_tags
) -> dict[str, Any]:
    """One step of the paper: its `gradient` at `weights`, and the losses that a log should show.

    slots: as in `Step`. tokens: whether a role's loss is the mean over its tokens, else over its slots' own means.
    loss: the summed loss of a slot and its number of tokens, given the model's call at the slot's weights.
    """
    model = copy.deepcopy(model).double().train()
    model._forward_pre_hooks.clear()
    model._forward_hooks.clear()
    leaves = {name: weight.detach().double().requires_grad_() for name, weight in weights.items()}
    roles: dict[bool, list[tuple[Any, Any]]] = {False: [], True: []}
    for noise, inputs in slots:
        moved = {name: leaf + noise[name] if noise else leaf for name, leaf in leaves.items()}
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        roles[noise is not None].append(
            loss(lambda at=moved, **kwargs: torch.func.functional_call(model, at, (), kwargs), inputs)
        )
    clean, perturbed = (_mean(roles[role], tokens) for role in (False, True))
    mix = (
        alpha * perturbed + (1 - alpha) * clean
        if clean is not None and perturbed is not None
        else clean
        if perturbed is None
        else perturbed
    )
    gradient = torch.autograd.grad(mix, list(leaves.values()), allow_unused=True, materialize_grads=True)
    result = {"gradient": dict(zip(leaves, gradient, strict=True)), "loss": _mean(roles[False] + roles[True], tokens)}
    return result | {"loss_clean": clean, "loss_perturbed": perturbed}


def _mean(pairs: list[tuple[Any, Any]], tokens: bool) -> Any:
    if not pairs:
        return None
    if tokens:
        return sum(loss for loss, _ in pairs) / sum(count for _, count in pairs)
    return sum(loss / count for loss, count in pairs) / len(pairs)


def assert_gradient(
    step: Step, expected: dict[str, Any], rtol: float = 1e-11, atol: float = 1e-13, factor: float = 1.0
) -> None:
    for name, gradient in step.gradient.items():
        torch.testing.assert_close(gradient.double() / factor, expected["gradient"][name], rtol=rtol, atol=atol)
