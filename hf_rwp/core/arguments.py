"""The flags of RWP; nothing heavy is imported for them."""

import math
from dataclasses import dataclass, field
from typing import Any

from hf_rwp.core.checks import check_all
from hf_rwp.core.gamma import MODES, SCHEDULES, gamma_factor


@dataclass
class RWPArguments:
    """
    The options of [`RWP`], and a schedule for gamma, as flags for `HfArgumentParser`.

    For a Trainer with arguments of its own, such as TRL's, put it in front of them:

        @dataclass
        class RWPSFTConfig(RWPArguments, SFTConfig): ...

    Args:
        rwp (`bool`, *optional*, defaults to `False`):
            Whether to train with Random Weight Perturbation.
        rwp_gamma (`float`, *optional*):
            Size of the noise, at least 0, relative to the weights. Defaults to 0.01 for `rwp_noise="filter"` and to 0.2
            for `"filter_normalized"`.
        rwp_alpha (`float`, *optional*, defaults to 0.5):
            The perturbed gradient's share of the mix, in [0, 1].
        rwp_seed (`int`, *optional*, defaults to 0):
            Seed of the noise.
        rwp_noise (`str`, *optional*, defaults to `"filter"`):
            What the noise is relative to: `"filter"` or `"filter_normalized"`.
        rwp_noise_1d (`bool`, *optional*, defaults to `True`):
            Whether biases and norm weights are perturbed as well.
        rwp_frozen (`bool`, *optional*, defaults to `False`):
            Whether frozen weights are perturbed as well.
        rwp_antithetic (`bool`, *optional*, defaults to `False`):
            Whether a step's perturbed gradients take a noise and its opposite in pairs.
        rwp_eta (`float`, *optional*, defaults to 0.0):
            ARWP's damping of the noise where gradients are large, at least 0.
        rwp_beta (`float`, *optional*, defaults to 0.99):
            Decay of the squared gradients that ARWP's damping follows, in [0, 1).
        rwp_schedule (`str`, *optional*, defaults to `"constant"`):
            How gamma grows over training: `"constant"`, `"linear"` or `"cosine"`.
        rwp_growth (`float`, *optional*, defaults to 0.0):
            How much larger gamma is at the end of a growing schedule, at least 0, in multiples of it.
        rwp_start (`float`, *optional*, defaults to 0.0):
            Fraction of training, in [0, 1], before which there is no noise.
        rwp_split (`bool`, *optional*, defaults to `True`):
            Whether Trainer takes both gradients from the halves of a batch that is a step by itself.

    Raises ValueError for a value out of range, and for `rwp_split=False` without Trainer's arguments.
    """

    help_group = "RWP"

    rwp: bool = field(default=False, metadata={"help": "Whether to train with Random Weight Perturbation."})
    rwp_gamma: float | None = field(
        default=None,
        metadata={
            "help": "Size of the noise, at least 0, relative to the weights; 0.01 for `--rwp_noise filter` and 0.2 for "
            "`filter_normalized` if not set."
        },
    )
    rwp_alpha: float = field(
        default=0.5,
        metadata={"help": "The perturbed gradient's share of the mix, in [0, 1]; 1 perturbs every gradient."},
    )
    rwp_seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    rwp_noise: str = field(
        default="filter",
        metadata={
            "help": "What the noise is relative to: the norm of every filter, as in the paper, or its weights' rms "
            "(`filter_normalized`).",
            "choices": MODES,
        },
    )
    rwp_noise_1d: bool = field(
        default=True, metadata={"help": "Whether biases and norm weights are perturbed as well."}
    )
    rwp_frozen: bool = field(
        default=False,
        metadata={
            "help": "Whether frozen weights are perturbed as well, such as the base weights under LoRA (Flat-LoRA)."
        },
    )
    rwp_antithetic: bool = field(
        default=False,
        metadata={
            "help": "Whether the perturbed gradients of a step, where it has two or more, take a noise and its "
            "opposite in pairs."
        },
    )
    rwp_eta: float = field(
        default=0.0, metadata={"help": "ARWP's damping of the noise where gradients are large, at least 0; 0 is none."}
    )
    rwp_beta: float = field(
        default=0.99, metadata={"help": "Decay of the squared gradients that ARWP's damping follows, in [0, 1)."}
    )
    rwp_schedule: str = field(
        default="constant", metadata={"help": "How gamma grows over training.", "choices": SCHEDULES}
    )
    rwp_growth: float = field(
        default=0.0,
        metadata={"help": "How much larger gamma is at the end of a growing schedule, at least 0, in multiples of it."},
    )
    rwp_start: float = field(
        default=0.0, metadata={"help": "Fraction of training, in [0, 1], before which there is no noise."}
    )
    rwp_split: bool = field(
        default=True,
        metadata={
            "help": "Whether Trainer takes both gradients from the halves of a batch that is a step by itself; `false` "
            "for losses that compare samples with each other, with accumulation or `--rwp_alpha 1`."
        },
    )

    def __post_init__(self) -> None:
        check_all(
            self,
            ("rwp_gamma", self.rwp_gamma is None or 0 <= self.rwp_gamma < math.inf, "finite and at least 0"),
            ("rwp_alpha", 0 <= self.rwp_alpha <= 1, "in [0, 1]"),
            ("rwp_seed", -(2**63) <= self.rwp_seed < 2**63, "an integer of 64 bits"),
            ("rwp_noise", self.rwp_noise in MODES, f"one of {', '.join(MODES)}"),
            ("rwp_eta", 0 <= self.rwp_eta < math.inf, "finite and at least 0"),
            ("rwp_beta", 0 <= self.rwp_beta < 1, "in [0, 1)"),
            ("rwp_schedule", self.rwp_schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("rwp_growth", 0 <= self.rwp_growth < math.inf, "finite and at least 0"),
            ("rwp_start", 0 <= self.rwp_start <= 1, "in [0, 1]"),
        )
        if self.rwp_growth and self.rwp_schedule == "constant":
            raise ValueError(
                f"rwp_growth={self.rwp_growth} has no effect while rwp_schedule is constant: set it to linear or cosine"
            )
        if not self.rwp_split and not any(kind.__name__ == "TrainingArguments" for kind in type(self).__mro__):
            raise ValueError(
                "rwp_split=False is for Trainer, which splits batches by itself: this loop takes the gradients of a "
                "step as it is written, so leave it out"
            )
        getattr(super(), "__post_init__", lambda: None)()

    def __getstate__(self) -> dict[str, Any]:
        """Without the token that Trainer's `hub_token` may hold: Trainer pickles its arguments beside the weights, and
        pushes them with it. Copies have none either, and fall back on the one of `hf auth login`."""
        secrets = ("hub_token", "push_to_hub_token")
        return {name: None if name in secrets else value for name, value in self.__dict__.items()}

    @property
    def rwp_options(self) -> dict[str, Any]:
        """Keyword arguments for `RWP`."""
        names = ("gamma", "alpha", "seed", "noise", "noise_1d", "frozen", "antithetic", "eta", "beta")
        options = {name: getattr(self, f"rwp_{name}") for name in names}
        if self.rwp_frozen and getattr(self, "torch_compile", False):
            options["frozen"] = "copy"  # stand-ins for weights would break graphs
        return options

    def rwp_gamma_factor(self, progress: float) -> float:
        """What to pass to `RWP.scale_gamma` at `progress`, the fraction of the optimizer steps behind us."""
        return gamma_factor(progress, self.rwp_schedule, self.rwp_growth, self.rwp_start)
