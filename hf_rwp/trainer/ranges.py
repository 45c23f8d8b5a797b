"""Which values of Trainer's own flags can train; nothing heavy is imported for them."""

from dataclasses import dataclass, field

from hf_rwp.core.arguments import RWPArguments
from hf_rwp.core.checks import check_all


@dataclass
class Ranges(RWPArguments):
    """Flags of Trainer and of RWP, whose values are checked ahead of the imports that Trainer's arguments need.

    Raises ValueError for a value out of range, most of which Trainer itself finds late, or trains nothing with.
    """

    num_train_epochs: float | None = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    seed: int = 0
    # Checked with Trainer's arguments, which know whether it may be false
    rwp_split: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_ranges(self)
        super().__post_init__()


def check_ranges(args: Ranges) -> None:
    """Raise ValueError for the first flag out of range. args: any with these flags."""
    epochs = args.num_train_epochs
    check_all(
        args,
        ("num_train_epochs", epochs is None or epochs > 0 or args.max_steps > 0, "above 0"),
        ("per_device_train_batch_size", args.per_device_train_batch_size >= 1, "at least 1"),
        ("per_device_eval_batch_size", args.per_device_eval_batch_size >= 1, "at least 1"),
        ("gradient_accumulation_steps", args.gradient_accumulation_steps >= 1, "at least 1"),
        ("learning_rate", args.learning_rate is None or args.learning_rate >= 0, "at least 0"),
        ("seed", args.seed >= 0, "at least 0"),
    )
