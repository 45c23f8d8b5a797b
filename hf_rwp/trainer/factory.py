"""RWP as one argument of an unmodified Trainer: a factory of optimizers, as transformers calls them.

1. Trainer calls the factory with the model once it is placed, and with the options; it does not hand over itself. So
   the factory looks for it among its callers.
2. A copy of it, which knows nothing of a factory, builds the optimizer that its arguments describe.
3. A callback tells the wrapper how many batches Trainer fetched for the coming step: an epoch's last has fewer. It
   makes buffers equal where Trainer is about to evaluate or save, and says what only RWPTrainerMixin does.
"""

import copy
import difflib
import inspect
import logging
import weakref
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from hf_rwp.core.optimizer import RWP
from hf_rwp.core.placement import mixes
from hf_rwp.trainer.checks import check_parallel

logger = logging.getLogger(__name__)

_OPTIONS = {
    name for name, parameter in inspect.signature(RWP).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY
}
_OPTIONS -= {"accumulation_steps"}  # the Trainer's own


class RWPFactory:
    """
    Random Weight Perturbation for `Trainer` as it is, and for TRL's SFTTrainer and RewardTrainer:

        Trainer(..., optimizer_cls_and_kwargs=(RWPFactory, {"optim": "adamw_torch", "gamma": 0.01}))

    The rest is the Trainer's: learning rate, betas, weight decay, parameter groups, schedule, and how many batches a
    step accumulates. What only [`RWPTrainer`] and [`RWPTrainerMixin`] do, this cannot:

    - halve a batch. On one replica (one process, or those that hold the weights together) set
      `gradient_accumulation_steps` to 2 or more, or `alpha=1`; an epoch's last step, if it has one batch, is an
      ordinary one, and a warning says so.
    - mix by tokens. Where the loss is a mean over all tokens of a step, batches of more tokens have more of the mix; a
      warning says so as well.
    - end cleanly by itself if training is cut off: then call `eval()` on `trainer.optimizer.optimizer` before you use
      the weights, and `sync_buffers()`, on all processes, ahead of an evaluation that Trainer does not begin by itself.
    - move gamma along a schedule, or log `loss_clean`, `loss_perturbed` and `loss_gap`.

    Args:
        opt_model (`torch.nn.Module`):
            The model, as Trainer passes it.
        optim (`str`, *optional*, defaults to the Trainer's own `optim`):
            The base optimizer, by its name in transformers.
        options (*optional*):
            Those of [`RWP`], by name, without `accumulation_steps`.

    Training then raises, as it begins, TypeError for an unknown option and where no Trainer is calling;
    ValueError for an unknown optimizer; NotImplementedError for one that steps inside the backward pass, and
    whatever `RWP` refuses; RuntimeError where a step has one gradient and nothing can be mixed. An `"optimizer"` in
    DeepSpeed's configuration takes the factory's place before it is asked: leave it out.
    """

    def __call__(self, opt_model: nn.Module, optim: str | None = None, **options: Any) -> RWP:
        for name in options.keys() - _OPTIONS:
            raise TypeError(_no_option(name))
        trainer = _calling_trainer()
        check_parallel(trainer.args)
        steps = trainer.args.gradient_accumulation_steps
        if options.get("frozen") is True and trainer.args.torch_compile:
            options["frozen"] = "copy"  # stand-ins for weights would break graphs
        base = _base_of(trainer, opt_model, optim)
        wrapper = RWP(base, opt_model, accumulation_steps=steps if steps > 1 else None, **options)
        trainer.remove_callback(_Windows)  # of an earlier optimizer
        trainer.add_callback(_Windows(trainer, wrapper))
        return wrapper


class _Windows(TrainerCallback):
    """Tells the wrapper how many gradients the coming step has, and when training pauses and ends."""

    def __init__(self, trainer: Trainer, wrapper: RWP) -> None:
        self._trainer = weakref.ref(trainer)
        self._wrapper = wrapper
        self._alpha: float | None = None  # of the wrapper, while a step goes without
        self._said: set[str] = set()

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        trainer, wrapper = self._trainer(), self._wrapper
        wrapper.train()  # an earlier training ended with `eval()`
        if not (wrapper.active and mixes(wrapper.alpha)):
            return
        if wrapper.replicas.count == args.gradient_accumulation_steps == 1:
            raise RuntimeError(
                f"nothing to mix: alpha={wrapper.alpha} mixes a clean and a perturbed gradient, and a step on "
                f"{args.world_size} process(es) that hold the weights once has one batch, which RWPFactory does not "
                "halve. Set gradient_accumulation_steps=2, with half the batch size for the same step, or alpha=1; or "
                "take RWPTrainerMixin, which does"
            )
        if trainer is not None and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None):
            self._say(
                "the loss is a mean over all labels of a step, as of tokens, and RWPFactory mixes by batch: batches of "
                "more labels have more of the mix than alpha says. RWPTrainerMixin mixes by label"
            )

    def on_step_begin(self, args: Any, *_: Any, **__: Any) -> None:
        self._restore()  # an interrupt may have left it out
        trainer, wrapper = self._trainer(), self._wrapper
        batches = args.gradient_accumulation_steps if trainer is None else trainer.current_gradient_accumulation_steps
        if batches == 1 < args.gradient_accumulation_steps and wrapper.replicas.count == 1 and mixes(wrapper.alpha):
            self._alpha, wrapper.alpha = wrapper.alpha, 0.0
            self._say(
                "an epoch ends with a step of one batch, an ordinary step: take a number of batches that "
                "gradient_accumulation_steps divides to avoid it"
            )
        else:
            wrapper.begin_window(batches)

    def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:
        self._restore()
        if control.should_evaluate or control.should_save:
            self._wrapper.sync_buffers()

    on_epoch_end = on_step_end

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._wrapper.sync_buffers()
        self._wrapper.eval()

    def _restore(self) -> None:
        if self._alpha is not None:
            self._wrapper.alpha, self._alpha = self._alpha, None

    def _say(self, message: str) -> None:
        """Once, on the main process."""
        trainer = self._trainer()
        if message not in self._said and (trainer is None or trainer.is_world_process_zero()):
            logger.warning(message)
        self._said.add(message)


def _no_option(name: str) -> str:
    if name == "accumulation_steps":
        return "RWPFactory takes no accumulation_steps: set the Trainer's gradient_accumulation_steps"
    near = difflib.get_close_matches(name, _OPTIONS, n=1)
    meant = f"; did you mean {near[0]}?" if near else "."
    return f"RWPFactory has no option {name}{meant} It has optim, {', '.join(sorted(_OPTIONS))}"


def _calling_trainer() -> Trainer:
    """The nearest caller's `self` that is a Trainer."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    raise TypeError(
        "RWPFactory was called by something else than a Trainer, whose arguments the optimizer takes: give it as "
        "Trainer(optimizer_cls_and_kwargs=(RWPFactory, {...})), or wrap an optimizer yourself, RWP(base, model)"
    )


def _base_of(trainer: Trainer, model: nn.Module, optim: str | None) -> Any:
    """What the Trainer would build by itself, were `optim` its own argument."""
    plain = copy.copy(trainer)
    plain.args = copy.copy(trainer.args)
    plain.optimizer = plain.optimizer_cls_and_kwargs = None
    names = [str(name.value) for name in OptimizerNames]
    name = str(OptimizerNames(plain.args.optim).value) if optim is None else optim
    if name not in names:
        near = [one for one in (f"{name}_torch", f"{name}w_torch") if one in names]
        near += difflib.get_close_matches(str(name), names, n=1)
        meant = f"; did you mean {near[0]}?" if near else f". There are {', '.join(names)}"
        raise ValueError(f"optim={name!r} is not an optimizer of transformers{meant}")
    if name in ("lomo", "adalomo") or name.endswith("_layerwise"):
        raise NotImplementedError(
            f"RWP does not work with optim={name!r}, which steps inside the backward pass, at weights that are noisy. "
            "What works is adamw_torch and others that step after it"
        )
    plain.args.optim = OptimizerNames(name)
    return Trainer.create_optimizer(plain, model)
