"""The flags of a run: where it writes, what it goes on from, how often it saves and reports."""

import importlib.util
from dataclasses import dataclass, field

from hf_rwp.core.checks import check_all
from hf_rwp.runs.given import Given

TRACKERS = ("tensorboard", "trackio", "wandb")
# Flags that may change on resuming without a word: nothing that is computed depends on them.
HARMLESS = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "logging_steps"}
HARMLESS |= {"checkpointing_steps", "save_total_limit", "max_bad_images", "eval_only", "push_to_hub"}
HARMLESS |= {"hub_model_id", "hub_private", "hub_revision", "hub_strategy", "hub_tag", "hub_logs"}


@dataclass
class RunArguments:
    """What a run writes and where, as flags. Raises ValueError for a value out of range.

    given: those that were typed, as `parse_arguments` notes them.
    """

    help_group = "run"

    given = Given()  # no flag
    numbered = False  # whether output_dir is the first of a row of folders, as no flag named one: `settle_folder`

    eval_only: bool = field(
        default=False,
        metadata={
            "help": "Whether to evaluate and not train, `--pretrained` weights or a checkpoint; data of a single split "
            "is fine if `--validation_split` names it."
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for all that is written. If not set, a new one for each run: outputs/DATA_METHOD_seedN, "
            "then .../2, .../3."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether a run that output_dir holds may be deleted for this one."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A run's folder, for its last checkpoint, one of its checkpoints, or `latest` for the last one in "
            "output_dir; with the flags that the run was given, and those given now."
        },
    )
    checkpointing_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps from one checkpoint to the next, beside each epoch's."}
    )
    save_total_limit: int = field(
        default=2, metadata={"help": "How many of the last checkpoints are kept, at least 1, beside the best one."}
    )
    logging_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps from one report of the loss to the next; replicas also agree then on "
            "unreadable images and on SIGTERM."
        },
    )
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": f"Where figures go: {', '.join(TRACKERS)} (as far as installed), or none."},
    )

    def __post_init__(self) -> None:
        check_all(
            self,
            ("checkpointing_steps", self.checkpointing_steps is None or self.checkpointing_steps > 0, "at least 1"),
            ("save_total_limit", self.save_total_limit >= 1, "at least 1"),
            ("logging_steps", self.logging_steps >= 1, "at least 1"),
        )
        if self.report_to == ["none"]:
            self.report_to = []
        for tracker in self.report_to:
            if tracker not in TRACKERS:
                raise ValueError(
                    f"unknown tracker {tracker!r} in report_to: choose from {', '.join(TRACKERS)}, or none"
                )
            if not importlib.util.find_spec(tracker):
                raise ValueError(f"report_to={tracker!r} is not installed: pip install {tracker}, or --report_to none")
