"""The flags of models for images that Trainer trains; nothing heavy is imported for them."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from hf_rwp.core.checks import check_all
from hf_rwp.images.arguments import ImageArguments
from hf_rwp.images.weights import SUFFIXES, find_weights


@dataclass
class ModelArguments(ImageArguments):
    """Which model, trained or not, and LoRA, as flags; with those of the images that it is for.

    Raises ValueError for a model that cannot be, and for LoRA without trained weights or without PEFT.
    """

    help_group = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Trained weights: a folder, or an id on the Hub, transformers' or timm's; or, without weights, the "
            "bare name of a timm model; a small ViT if not set."
        },
    )
    model_kwargs: str = field(
        default="{}",
        metadata={"help": "Further arguments, as JSON or YAML: of timm's model, or of transformers' configuration."},
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of LoRA on every linear layer but the head, at least 1; none if not set."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of LoRA, in multiples of 1/r, above 0; r if not set."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout ahead of LoRA's layers, in [0, 1)."})
    eval_only: bool = field(
        default=False,
        metadata={"help": "Whether to evaluate `--model_name_or_path`, or a run's checkpoint, without training."},
    )

    def __post_init__(self) -> None:
        img_size = self.img_size
        super().__post_init__()
        if self.model_name_or_path is not None:
            self.img_size = img_size  # the digits' 32 pixels are the small ViT's
        elif self.img_size is None:
            self.img_size = 32  # on any images
        check_all(
            self,
            ("lora_r", self.lora_r is None or self.lora_r >= 1, "at least 1"),
            ("lora_alpha", self.lora_alpha is None or self.lora_alpha > 0, "above 0"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
            ("model_kwargs", isinstance(yaml.safe_load(self.model_kwargs), dict), "a mapping, as in {name: value}"),
        )
        if self.lora_r and not importlib.util.find_spec("peft"):
            raise ValueError(f"lora_r={self.lora_r} needs PEFT, which is not installed: pip install peft")
        evaluates = self.eval_only and not self.of_checkpoint
        if (self.lora_r or evaluates) and not self.weights:
            flag = "eval_only" if evaluates else f"lora_r={self.lora_r}"
            raise ValueError(
                f"{flag} is for trained weights, and model_name_or_path={self.model_name_or_path!r} has none: set it "
                "to a folder with a model, or to an id on the Hub"
            )
        if self.lora_r is None and (self.lora_alpha or self.lora_dropout):
            raise ValueError("lora_alpha and lora_dropout have no effect without LoRA: set lora_r")
        name = self.model_name_or_path
        from hf_rwp.images.models import check_model_kwargs  # heavy, and `--help` needs none
        from hf_rwp.images.names import check_tag, is_model, similar_models

        check_model_kwargs(yaml.safe_load(self.model_kwargs))
        if name and not self.weights and is_model(name):
            check_tag("model_name_or_path", name)
        elif name and not self.weights:
            raise ValueError(_no_model(name, similar_models(name)))

    def look_ahead(self) -> None:
        """Raise ValueError for weights that are not there, and for a name that is in none of timm's files."""
        from hf_rwp.images.timm_files import similar_in_files

        super().look_ahead()
        name = self.model_name_or_path
        if self.weights is None and name and (names := similar_in_files(name)) is not None:
            raise ValueError(_no_model(name, names))

    @property
    def of_checkpoint(self) -> bool:
        """Whether a checkpoint's weights come in place of the model's own."""
        return getattr(self, "resume_from_checkpoint", None) is not None

    @property
    def weights(self) -> str | None:
        """Where trained weights come from, a folder with a model or an id on the Hub; None from scratch.

        Raises ValueError for a path that leads nowhere or to no model.
        """
        name = self.model_name_or_path
        if not name or not ("/" in name or Path(name).expanduser().exists() or Path(name).suffix in SUFFIXES):
            return None
        source = find_weights(name, "model_name_or_path")
        if source.is_file:
            raise ValueError(
                f"model_name_or_path={name!r} is a file of weights, which does not say what model they are of: "
                "imagenet_rwp.py loads it, as --model NAME --pretrained FILE; here a folder with a config.json does"
            )
        return str(source.path or source.hub_id)


def _no_model(name: str, names: Sequence[str]) -> str:
    return (
        f"model_name_or_path={name!r} is neither a folder, nor an id on the Hub (which has a slash), nor one of timm's "
        f"models. Similar ones: {', '.join(names)}"
    )
