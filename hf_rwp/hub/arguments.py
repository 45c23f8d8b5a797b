"""The flags of a push to the Hub."""

import re
from dataclasses import dataclass, field

HUB_STRATEGIES = ("end", "best", "every_save")


@dataclass
class HubArguments:
    """Whether and where a model goes on the Hub, as flags; Trainer has its own under the same names.

    No flag takes a token: huggingface_hub finds the one of `hf auth login`, or HF_TOKEN.
    Raises ValueError for a push without a repository, and for what cannot be the name of one.
    """

    help_group = "Hub"

    push_to_hub: bool = field(default=False, metadata={"help": "Whether to push the model, with its card, to the Hub."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where on the Hub: USER/NAME."})
    hub_private: bool = field(default=False, metadata={"help": "Whether the repository is made private."})
    hub_revision: str | None = field(
        default=None, metadata={"help": "A branch to push to, made if missing; main if not set."}
    )
    hub_tag: str | None = field(default=None, metadata={"help": "A tag for the last commit, such as v1.0."})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "What is pushed: the last weights at the `end`; the `best` ones by held-out accuracy, in the "
            "background whenever they improve; or those of `every_save`, in the background, and the last ones.",
            "choices": HUB_STRATEGIES,
        },
    )
    hub_logs: bool = field(default=False, metadata={"help": "Whether TensorBoard's logs are pushed too."})

    def __post_init__(self) -> None:
        if not self.push_to_hub:
            return
        name = self.hub_model_id or ""
        if not re.fullmatch(r"[\w.-]+/[\w.-]{1,96}", name, re.ASCII) or ".." in name or "--" in name:
            raise ValueError(
                "push_to_hub needs hub_model_id, which must be USER/NAME of letters, digits, -, _ and ., got "
                f"{self.hub_model_id!r}"
            )
        if self.hub_strategy not in HUB_STRATEGIES:
            raise ValueError(f"hub_strategy must be one of {', '.join(HUB_STRATEGIES)}, got {self.hub_strategy!r}")
