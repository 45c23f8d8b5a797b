"""RWP for `transformers.Trainer`: the optimizer wrapper, and what only Trainer knows.

1. `create_optimizer` wraps the optimizer that Trainer made. The wrapper begins and ends micro-steps by itself.
2. `get_batch_samples` fetches the batches of one optimizer step, the window: gamma moves along its schedule, and the
   wrapper is told how many gradients there are, and how Trainer's loss weighs them where it is a mean over tokens.
3. `training_step` takes one gradient. A batch that is a window by itself, on one replica, is split in halves: the clean
   gradient comes from the first, the perturbed one from the second. Each process splits its own.
4. Buffers are made equal before evaluation and saving, and the weights are clean however training ends.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_rwp.core.arguments import RWPArguments
from hf_rwp.core.losses import LossTracker
from hf_rwp.core.optimizer import RWP
from hf_rwp.core.placement import mixes
from hf_rwp.core.refusals import refuse_lone_processes
from hf_rwp.runs.records import base_of, environment, scrub_paths, with_by_class
from hf_rwp.runs.sharded import is_sharded_model
from hf_rwp.trainer.checks import check_batches, check_supported, is_online, is_packed, splits, whole
from hf_rwp.trainer.comparing import noticing
from hf_rwp.trainer.halves import in_halves, rows
from hf_rwp.trainer.items import Slots, alike, count_once, slots_of

logger = logging.getLogger(__name__)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


if TYPE_CHECKING:  # what `super()` finds depends on the Trainer it is put in front of
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object


class RWPTrainerMixin(_AnyTrainer):
    """
    RWP for any subclass of `Trainer`: put it in front, and [`RWPArguments`] in front of the arguments.

        class RWPSFTTrainer(RWPTrainerMixin, SFTTrainer): ...

        @dataclass
        class RWPSFTConfig(RWPArguments, SFTConfig): ...

    Without `rwp=True` in its arguments it is that Trainer, bit for bit. With it, replicas of the weights share the
    clean and the perturbed gradients between them (processes under DDP, groups of them under HSDP). A single one, which
    many processes may hold together (FSDP2, tensor parallelism), takes them in turn from the batches that a step
    accumulates, or from the halves of a single one. Each log of the training loss, which stays the plain one, also has
    `loss_clean`, `loss_perturbed` and `loss_gap`, a free measure of sharpness.

    Attributes:
        rwp ([`RWP`], *optional*):
            The optimizer wrapper, whose `report()` says what really happened; `None` before training and without RWP.

    Raises TypeError for arguments without RWP's flags; NotImplementedError under FSDP of version 1, DeepSpeed ZeRO-3,
    DataParallel and TPUs; ValueError for `auto_find_batch_size` on many processes, for an optimizer that is
    wrapped already, and for a batch that cannot be split, ahead of all work where class and arguments tell.
    """

    args: Any  # RWPArguments and TrainingArguments in one
    model: Any
    optimizer: Any
    push_in_progress: Any
    rwp: RWP | None = None
    _given: Mapping[str, Any] = {}  # what checkpoints keep, as the arguments had it
    _report: Mapping[str, Any] | None = None  # of the wrapper, after training
    _best_step: int | None = None  # whose weights these are, where training ended with the best ones
    _homes: list[int] | None = None  # by process, which replica it belongs to
    _slots: Slots | None = None  # of the coming step; None where Trainer adds no items up
    _parts: Sequence[float] = ()  # how much of this process's loss each coming micro-step is
    _splits = False  # whether the window's one batch is split
    _said = False  # that batches are taken twice
    _looked = False  # whether such a loss was looked for as `comparing` finds
    _rows_are_samples = True  # as far as seen: pairs for DPO or a reward model lie one after the other

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for given in (*args, *kwargs.values()):
            if isinstance(given, RWPArguments) and given.rwp:
                refuse_lone_processes()  # ahead of Trainer, which makes a folder
                if isinstance(given, TrainingArguments):
                    check_batches(given, type(self))
        super().__init__(*args, **kwargs)
        self.check_rwp()

    def check_rwp(self) -> None:
        """Refuse, or say, what is known once there is a Trainer; raises as the class does."""
        if not isinstance(self.args, RWPArguments):
            raise TypeError(
                f"{type(self.args).__name__} has no flags of RWP: use RWPTrainingArguments, or a dataclass that "
                f"inherits from (RWPArguments, {type(self.args).__name__})"
            )
        if self.args.rwp:
            check_supported(self.args, self.model)
            if is_packed(self.args) and splits(self.args):
                self._say_twice("packing, or padding_free=True, makes one row of a batch, which cannot be split")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's optimizer, or the one given as `optimizers`, wrapped in RWP."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self.args.rwp:
            if self.rwp is not None:  # it was on in an earlier train()
                self.rwp.remove()
                optimizer = self.optimizer = self.rwp.base
                self.rwp = None
            return optimizer
        if isinstance(optimizer, AcceleratedOptimizer):  # from an earlier train()
            optimizer = optimizer.optimizer
        if isinstance(optimizer, RWP) and optimizer is not self.rwp:
            raise ValueError(
                "optimizers holds an RWP, and rwp=True would wrap it again: give the base optimizer, or leave rwp to "
                "False and its options to the wrapper"
            )
        if optimizer is not self.rwp:
            self.optimizer = self.rwp = RWP(optimizer, self.model, **self.args.rwp_options)
            self._given = self._kept_by_checkpoints()
        self._losses, self._homes = LossTracker(self.rwp), None
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # DeepSpeed has loaded its own by now
        for name, loaded in self._kept_by_checkpoints().items():
            given = self._given[name]
            if loaded != given:
                raise ValueError(
                    f"{checkpoint} was written with {name}={loaded!r}, which it keeps, and not with {given!r}: "
                    f"resume with the same {name}, or start anew from its weights"
                )

    def _kept_by_checkpoints(self) -> dict[str, Any]:
        """What comes back with the wrapper's state, whatever the arguments say."""
        if self.rwp is None:
            return {}
        gammas = sorted({group["initial_rwp_gamma"] for group in self.rwp.param_groups})
        gamma = gammas[0] if len(gammas) == 1 else gammas
        return {"rwp_gamma": gamma, "rwp_seed": self.rwp.param_groups[0]["rwp_seed"]}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._report = self._best_step = None
        try:
            output = super().train(*args, **kwargs)
            self._sync_buffers()
            if self.rwp is not None:
                self._report = self.rwp.report()  # while all replicas are here: the main one may push by itself
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._best_step = self.state.best_global_step
            return output
        finally:
            if self.rwp is not None:
                self.rwp.disarm()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Trainer's batches of one optimizer step and their number of tokens; begins RWP's window."""
        self._slots, self._splits = None, False
        if self.rwp is not None:
            self.rwp.scale_gamma(self.args.rwp_gamma_factor(self.state.global_step / self.state.max_steps))
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.rwp is not None and batches:
            self._rows_are_samples &= max(map(rows, batches)) <= self._train_batch_size
            self._splits = self._mixes and self.rwp.replicas.count == len(batches) == 1
            if self._splits and is_online(type(self)) and self.args.gradient_accumulation_steps > 1:
                self._splits = False  # an epoch's last: an ordinary step, since taking it twice takes the next answers
                self.rwp.scale_gamma(0.0)
            slots = self._slots or alike(len(batches))
            self._parts = slots.parts
            if not self._splits:
                self.rwp.begin_window(len(batches), slots.shares)
        return batches, count

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Trainer's count, as it is; how it divides between the slots is remembered for the mix."""
        count = super()._get_num_items_in_batch
        if self.rwp is None or not self._mixes or not batch_samples:
            return count(batch_samples, device)
        several = self.rwp.replicas.count > 1
        total, everyone, own = count_once(
            self.accelerator, lambda batches: count(batches, device), batch_samples, each=not several
        )
        if total is not None:
            self._slots = slots_of(self.args.process_index, self._replica_of_each(), len(batch_samples), everyone, own)
        return total

    def _replica_of_each(self) -> list[int]:
        """By process, which replica it belongs to. Collective, once, where a mesh holds the weights."""
        replicas, world = self.rwp.replicas, self.args.world_size  # type: ignore[union-attr]
        if self._homes is None:
            if replicas.count == 1:
                self._homes = [0] * world
            elif not replicas.peers:
                self._homes = list(range(world))
            else:
                self._homes = self.accelerator.gather(torch.tensor([replicas.index], device=self.args.device)).tolist()
        return self._homes

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One gradient, or two where the batch is split; returns the plain loss as Trainer does."""
        step = super().training_step
        if self.rwp is None:
            return step(model, inputs, num_items_in_batch)
        if not self._splits:
            if not self._parts:
                raise RuntimeError(
                    "training_step runs more often than get_batch_samples has fetched batches, so RWP cannot know how "
                    "many gradients make a step: call both once a batch, as Trainer does"
                )
            loss = step(model, inputs, num_items_in_batch)
            part, *self._parts = self._parts
            if part:
                self._losses.update(loss / part, part)
            return loss
        # Each half gets a mean over its own items, and Trainer adds the two up as they are: shares of 1 and 1.
        halves, sizes = self._halves_of(inputs)
        twice, tokens = halves[0] is inputs, getattr(self, "_total_train_tokens", None)  # TRL's counter
        counts: list[Any] = [None, None]
        if num_items_in_batch is not None:
            count = super()._get_num_items_in_batch
            counts = [torch.as_tensor(count([half], self.args.device)) for half in halves]
            sizes = [int(items) for items in counts]
            counts = [items.clamp(min=1) for items in counts]  # a half without any must not give a NaN
        self.rwp.begin_window(2, (float(sizes[0] > 0), float(sizes[1] > 0)))
        loss = torch.zeros((), device=self.args.device)
        for half, items, size in zip(halves, counts, sizes, strict=True):
            if twice and tokens is not None:
                self._total_train_tokens = tokens  # the second time is the same tokens
            with nullcontext() if twice or self._looked else noticing(self, model, half):
                mean, part = step(model, half, items), size / (sum(sizes) or 1)
            self._looked |= not twice
            self._losses.update(mean, part)
            loss = loss + mean * part
        return loss

    def _halves_of(self, inputs: Any) -> tuple[list[Any], list[int]]:
        """A batch in halves, or twice the whole of it, and how many samples each has."""
        smallest = 2 if self._has_batch_norm() else 1
        why = "rwp_split=False leaves batches whole" if not self.args.rwp_split else ""
        if not self._rows_are_samples:
            found = f"a batch of at most {self._train_batch_size} samples has {rows(inputs)} rows"
            why = f"{found}: a half of its rows is not one of its samples"
        if why and self.args.gradient_accumulation_steps == 1:
            raise ValueError(whole(why))
        halves, sizes = in_halves(inputs, None if why else smallest)
        if halves[0] is inputs:
            small = f"a batch of {sizes[0]} rows is too small to split"
            self._say_twice("an epoch ends with a step of one batch, which is left whole" if why else small)
        return halves, sizes

    def _say_twice(self, why: str) -> None:
        if not self._said:
            self._said = True
            logger.warning("%s: both gradients are taken on it, at twice the cost", why)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.rwp is not None and {"loss", "learning_rate"} <= logs.keys():  # Trainer's own log of training
            kept = {"loss_clean", "loss_perturbed", *(() if is_online(type(self)) else ("loss_gap",))}
            logs.update({name: loss for name, loss in self._losses.compute().items() if name in kept})
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._sync_buffers()
        return super().evaluation_loop(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._sync_buffers()
        super()._save_checkpoint(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | bool | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        tag: str | None = None,
        results: Mapping[str, Any] | None = None,
        pictures: Sequence[Any] = (),
        **facts: Any,
    ) -> Any:
        """Trainer's, with the card of RWP: weights, configuration, preprocessing, card and figures in one commit.

        Written to `hub` in the output folder first; neither Trainer's pickled arguments nor its logs go along, and in
        pushes while training neither, unless `hub_strategy` pushes whole checkpoints, which hold pickles. The main
        process does it all: it may call this, or `save_model` with `push_to_hub=True`, by itself. Where a mesh holds
        the weights (FSDP2, tensor parallelism) all processes must, since they are gathered first. results: what a
        recipe's results.json holds; taken from Trainer's log if not given, what RWP did included once training is over.
        pictures, facts: as `hf_rwp.push_to_hub` takes them; of those of Trainer, `model_name`, `finetuned_from`,
        `tasks` and `dataset_tags`, too.

        Returns the commit's address, or a Future of it where `blocking` is False; None but on the main process. Raises
        `hf_rwp.hub.push.PushError`, with the command that finishes the job, when the push failed.
        """
        if not self.args.rwp:
            names = {"tag": tag, "results": results, "pictures": pictures or None}
            given = [name for name, value in names.items() if value is not None]
            if given:
                raise ValueError(f"{', '.join(given)} needs rwp=True: without it this is Trainer's own push")
            if private is not None:  # Trainer of transformers 5.18 does not know it
                facts["private"] = private
            return super().push_to_hub(commit_message, blocking, token, revision, **facts)  # type: ignore[arg-type]
        from hf_rwp.hub import push as hub  # huggingface_hub, only for those who push
        from hf_rwp.hub.card import add_card
        from hf_rwp.hub.export import save_any

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.rwp is not None:
            self.rwp.eval()
        model, main = self.accelerator.unwrap_model(self.model, keep_torch_compile=False), self.is_world_process_zero()
        if not main and not is_sharded_model(model):
            return None
        output = Path(self.args.output_dir)
        repo_id, folder = self.hub_model_id or self.args.hub_model_id or output.absolute().name, output / "hub"
        if main:
            self._finish_current_push()
        of_model = save_any(model, folder)
        if not main:
            return None
        known = dict(results) if results is not None else self._results()
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        said = {**of_model, **_card_facts(facts)}
        said["tags"] = [*said.get("tags", ()), *(getattr(self.model, "model_tags", None) or ())]
        add_card(folder, known, pictures=pictures, repo_id=repo_id, **said)
        where: dict[str, Any] = {"revision": revision or self.args.hub_revision, "tag": tag}
        where["private"] = self.args.hub_private_repo if private is None else private
        where["token"] = self.args.hub_token if token is None else token
        where["message"] = commit_message or "End of training"
        return (hub.push if blocking else hub.push_later)(folder, repo_id, **where)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer's uploads all of its output folder, with pickled arguments and logs that name the machine.
        strategy = self.args.hub_strategy
        if not self.args.rwp or strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            super()._push_from_checkpoint(checkpoint_folder)
        elif strategy != HubStrategy.END:
            job: Any = getattr(self, "push_in_progress", None)  # only the main process has one
            idle = job is None or job.is_done()
            pushes = [self.is_world_process_zero() and (self.args.hub_always_push or idle)]
            if is_sharded_model(self.model):  # all are needed
                dist.broadcast_object_list(pushes)
            if pushes[0]:
                job = self.push_to_hub(f"Training in progress, step {self.state.global_step}", blocking=False)
                self.push_in_progress = None if job is None else PushInProgress([job])  # type: ignore[arg-type]

    def _results(self) -> dict[str, Any]:
        """What Trainer's log says of the run, as a recipe's results.json has it."""
        best = self._best_step
        step = self.state.global_step if best is None else best
        rows: dict[float, dict[str, Any]] = {}
        final: dict[str, Any] = {}
        for line in self.state.log_history:
            named = {_LOGGED.get(name, name.removeprefix("eval_")): value for name, value in line.items()}
            rows[line["step"]] = rows.get(line["step"], {}) | named
            evaluated = any(name.startswith("eval_") for name in line)  # which is true only of the weights of its step
            if line["step"] == step or (line["step"] < step and not evaluated):
                final |= named
        history = list(rows.values())
        final["step"] = step
        if self._report is not None and self.rwp is not None:
            final["rwp"] = {**self._report, "gamma": self.rwp.defaults["rwp_gamma"]}
        arguments = scrub_paths(self.args.to_dict())
        arguments = {name: value for name, value in arguments.items() if not name.endswith("_dir")}
        around = environment(self.accelerator)
        results: Any = {
            "final": final,
            **({} if best is None else {"chosen": "best"}),
            "seconds": next((row["train_runtime"] for row in history if "train_runtime" in row), None),
            "arguments": arguments,
            "base_model": base_of(self.model),
            **around,
            "versions": around["versions"] | {name: version(name) for name in self._frameworks()},
            "history": [row for row in history if {"train_loss", "eval_loss", "top1", "accuracy"} & row.keys()],
        }
        return {**with_by_class(results)}

    def _frameworks(self) -> list[str]:
        """The packages around transformers that this run is made with."""
        of_trl = any(kind.__module__.startswith("trl.") for kind in type(self).__mro__)
        return [*(["trl"] if of_trl else []), *(["peft"] if hasattr(self.model, "get_base_model") else [])]

    @property
    def _mixes(self) -> bool:
        """Whether the coming window has clean and perturbed gradients."""
        return self.rwp is not None and self.rwp.active and mixes(self.rwp.alpha)

    def _has_batch_norm(self) -> bool:
        return any(isinstance(module, _BATCH_NORMS) for module in self.model.modules())

    def _sync_buffers(self) -> None:
        if self.rwp is not None:
            self.rwp.sync_buffers()


# Trainer's names of what a recipe's history has, too; its own `train_loss` is the mean over all of training.
_LOGGED = {"loss": "train_loss", "eval_loss": "eval_loss", "train_loss": "mean_loss", "total_flos": "total_flos"}


def _card_facts(named: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a card among the names that Trainer's `push_to_hub` takes."""
    ours = {"model_name": "name", "finetuned_from": "base_model", "tasks": "task"}
    facts = {ours.get(name, name): value for name, value in named.items()}
    if isinstance(facts.get("tags"), str):
        facts["tags"] = [facts["tags"]]
    datasets = facts.pop("dataset_tags", None)  # ids on the Hub, where `dataset` is a name
    if datasets is not None:
        facts["data"] = facts.pop("dataset", None)
        facts["dataset"] = datasets if isinstance(datasets, str) else datasets[0]
    return facts


class RWPTrainer(RWPTrainerMixin, Trainer):
    """
    `Trainer` with Random Weight Perturbation behind the flag `rwp`; see [`RWPTrainerMixin`] for what it does.

    Args:
        model (`torch.nn.Module`, *optional*):
            The model to train, as `Trainer` takes it.
        args ([`RWPTrainingArguments`]):
            Trainer's arguments, with those of RWP.
        kwargs (*optional*):
            The others of `Trainer`: `train_dataset`, `data_collator`, `compute_metrics`, ...
    """
