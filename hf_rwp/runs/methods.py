"""The methods that recipes/compare.py sets side by side, the terms, and what each of them tries."""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rwp import missing
from hf_rwp.core.checks import check_all

if TYPE_CHECKING:
    from accelerate import Accelerator

Settings = Mapping[str, Any]  # lr, weight_decay, and strength, None where a method has none

PROTOCOLS = {
    "images": "equal images per step and equal steps",
    "gradients": "equal gradient evaluations",
    "time": "equal wall-clock",
}


@dataclass(frozen=True)
class Method:
    """strength: what is tuned beside learning rate and weight decay: rho, gamma, label smoothing, or how many epochs an
    average of weights reaches back; None for nothing, and for the flags' gamma. sam_every: SAM's second gradient in one
    of so many steps, 0 for none. smoothed: whether labels are. averaged: whether the weights that are judged are an
    exponential moving average. parts: how many a step's batch is taken in, without noise. rwp: options of `RWP` and of
    gamma's schedule, over those of the flags; None where it is not RWP."""

    title: str
    strength: float | None = None
    sam_every: int = 0
    adaptive: bool = False
    smoothed: bool = False
    averaged: bool = False
    parts: int = 1
    rwp: Mapping[str, Any] | None = None

    @property
    def gradients_per_image(self) -> float:
        return 1 + (1 / self.sam_every if self.sam_every else 0)


METHODS = {
    "base": Method("plain"),
    "sam": Method("SAM", 0.05, sam_every=1),  # rho as in arXiv 2010.01412
    "asam": Method("ASAM", 0.5, sam_every=1, adaptive=True),  # rho as in arXiv 2102.11600
    "sam10": Method("SAM every 10th step", 0.05, sam_every=10),  # composer's advice
    "rwp": Method("RWP", rwp={}),
    "rwp_1x": Method(
        "RWP, alpha 1", 0.001, rwp={"alpha": 1.0, "schedule": "cosine", "growth": 10.0}
    ),  # arXiv 2404.00357
    "arwp": Method("ARWP", 0.015, rwp={"eta": 0.1, "beta": 0.99}),  # m-ARWP in arXiv 2404.00357
    "rwp_antithetic": Method("RWP, antithetic", rwp={"antithetic": True}),
    "rwp_normalized": Method("RWP, filter_normalized", 0.2, rwp={"noise": "filter_normalized"}),
    "base_smooth": Method("plain, labels smoothed", 0.2, smoothed=True),
    "base_ema": Method("plain, weights averaged", 2.0, averaged=True),
    # Controls: what RWP does to a batch, without noise; and its noise in every gradient, without a clean one.
    "base_halves": Method("plain, batch in halves", parts=2),
    "rwp_unmixed": Method("RWP's noise, unmixed", rwp={"alpha": 1.0}),
    "rwp_late20": Method("RWP in the last 20 %", rwp={"start": 0.8}),
    "rwp_late10": Method("RWP in the last 10 %", rwp={"start": 0.9}),
}
CONTROLS = ("base_smooth", "base_ema", "base_halves", "rwp_unmixed", "rwp_late20", "rwp_late10")


@dataclass
class ComparisonArguments:
    """What is compared, under which terms, and the search for each method's settings, as flags.

    Raises ValueError for a value out of range.
    """

    help_group = "comparison"

    methods: list[str] = field(
        default_factory=lambda: [name for name in METHODS if name not in CONTROLS],
        metadata={"help": f"Which to compare: {', '.join(METHODS)}; all but the last {len(CONTROLS)} if not set."},
    )
    protocols: list[str] = field(
        default_factory=lambda: ["images"], metadata={"help": f"Under which terms: {', '.join(PROTOCOLS)}."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Of weights, order and augmentation; a run for each."}
    )
    settings_from: list[str] = field(
        default_factory=list,
        metadata={"help": "Other comparisons, by their names, whose searches choose the settings as well."},
    )
    search: bool = field(default=False, metadata={"help": "Whether to choose lr, weight decay, rho and gamma first."})
    lrs: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2], metadata={"help": "Learning rates to try."})
    weight_decays: list[float] = field(default_factory=lambda: [5e-4, 2e-3], metadata={"help": "Weight decays to try."})
    strengths: list[float] = field(
        default_factory=lambda: [0.5, 1.0, 2.0], metadata={"help": "Factors on a method's strength to try."}
    )
    evaluations: int = field(default=10, metadata={"help": "How often a run is evaluated and saved, evenly spread."})
    checkpoint_seconds: float = field(
        default=0, metadata={"help": "Seconds of training from a checkpoint to the next evaluation that saves one."}
    )
    early_stopping: bool = field(
        default=False,
        metadata={
            "help": "Whether a run is also judged as of the evaluation that was best on images held out of "
            "`--train_images`, whose labels are right."
        },
    )
    robustness_images: int = field(
        default=0,
        metadata={"help": "Images to measure on what noise, rounding and pruning leave of a run; 0 for none."},
    )

    def __post_init__(self) -> None:
        lists = ("methods", "protocols", "seeds", "lrs", "weight_decays", "strengths")
        each_once = {name: 0 < len(set(getattr(self, name))) == len(getattr(self, name)) for name in lists}
        check_all(
            self,
            ("methods", set(self.methods) <= set(METHODS), f"some of {', '.join(METHODS)}"),
            ("protocols", set(self.protocols) <= set(PROTOCOLS), f"some of {', '.join(PROTOCOLS)}"),
            *((name, valid, "one value or more, each once") for name, valid in each_once.items()),
            ("seeds", all(0 <= seed < 2**32 for seed in self.seeds), "in [0, 2^32)"),
            ("evaluations", self.evaluations >= 1, "at least 1"),
            ("checkpoint_seconds", self.checkpoint_seconds >= 0, "at least 0"),
            ("robustness_images", self.robustness_images >= 0, "at least 0"),
        )
        needs_sam = [name for name in self.methods if METHODS[name].sam_every]
        if needs_sam and not importlib.util.find_spec("pytorch_optimizer"):
            raise ModuleNotFoundError(missing(f"method {needs_sam[0]!r}", "pytorch_optimizer", "compare"))

    def grid(self, strength: float | None) -> list[dict[str, float | None]]:
        """The settings that a method tries: as many for each, with or without a strength.

        All pairs of learning rate and weight decay, with the strength's factors spread over them as in a Latin square.
        """
        settings = []
        for row, lr in enumerate(self.lrs):
            for column, weight_decay in enumerate(self.weight_decays):
                factor = self.strengths[(row + column) % len(self.strengths)]
                own = None if strength is None else strength * factor
                settings.append({"lr": lr, "weight_decay": weight_decay, "strength": own})
        return settings


def count_steps(protocol: str, seen: int, per_step: int, method: Method, mixing: bool, time: float) -> tuple[int, int]:
    """How many steps a whole run has, at least 1, and how many images each of them takes.

    seen: images that plain training sees under `images`; per_step: in a step. mixing: whether the method takes a clean
    and a perturbed gradient. time: of its step, in those of plain training, under `time`.
    """
    if protocol == "time":
        return max(1, round(seen / per_step / time)), per_step
    if protocol == "images":
        return max(1, round(seen / per_step)), per_step
    per_step *= 2 if mixing else 1
    return max(1, round(2 * seen / method.gradients_per_image / per_step)), per_step


def relative_times(
    accelerator: "Accelerator", file: Path, names: Sequence[str], measure: Callable[[list[str]], Mapping[str, float]]
) -> dict[str, float]:
    """The time of each method's step in those of plain training; measured once, and kept in a file. Collective.

    measure: seconds for names of methods, alike on all replicas.
    """
    from accelerate.utils import broadcast_object_list  # heavy, and the flags need none

    times: dict[str, float]
    (times,) = broadcast_object_list([json.loads(file.read_text()) if file.exists() else {"base": 1.0}])
    missing = [name for name in names if name not in times]
    if missing:
        seconds = measure(["base", *missing])
        times |= {name: seconds[name] / seconds["base"] for name in missing}
        if accelerator.is_main_process:
            file.write_text(json.dumps(times))
    return times
