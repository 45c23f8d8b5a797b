"""The flags of a short training on small images that lie on the device: model, optimizer, schedule, data and noise."""

from dataclasses import dataclass, field

import yaml

from hf_rwp.core.arguments import RWPArguments
from hf_rwp.core.checks import check_all
from hf_rwp.images.arguments import MemoryArguments

PAIRS = "a multiple of 4, for antithetic pairs of halves"


@dataclass
class SmallArguments(MemoryArguments, RWPArguments):
    """What is learned and how, as flags. Raises ValueError for a value out of range."""

    model: str = field(default="test_resnet", metadata={"help": "A timm model, or wrn16_8, a WideResNet-16-8."})
    model_kwargs: str = field(default="{}", metadata={"help": "Further arguments of the model, as JSON or YAML."})
    small_stem: bool = field(
        default=True,
        metadata={
            "help": "Whether a ResNet on images of at most 64 pixels begins as for CIFAR, with a 3x3 convolution and "
            "no pooling; `output_stride`, which imagenet_rwp.py needs for that, is then left out."
        },
    )
    channels_last: bool = field(default=True, metadata={"help": "Whether to use the channels_last memory format."})
    torch_compile: bool = field(default=False, metadata={"help": "Whether to compile the model with torch.compile."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "What accelerate launch says if not set.", "choices": ("no", "bf16")}
    )
    epochs: int = field(default=10, metadata={"help": "Passes over the training images, for protocol `images`."})
    batch_size: int = field(default=64, metadata={"help": "Images per replica and optimizer step."})
    opt: str = field(default="sgd", metadata={"help": "A timm optimizer; sgd has Nesterov momentum."})
    lr: float = field(default=0.1, metadata={"help": "Peak learning rate, without a search."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay, without a search."})
    weight_decay_1d: bool = field(default=False, metadata={"help": "Whether biases and norm weights decay as well."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum, where the optimizer has one."})
    sched: str = field(default="cosine", metadata={"help": "Schedule of the learning rate.", "choices": ("cosine",)})
    warmup_epochs: float = field(default=1, metadata={"help": "Epochs of linear warm-up."})

    def __post_init__(self) -> None:
        for kind in (MemoryArguments, RWPArguments):
            kind.__post_init__(self)
        plain = "without noise it is the method base"
        check_all(
            self,
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size % 2 == 0 < self.batch_size, "even, for RWP to halve it, and above 0"),
            ("batch_size", not self.rwp_antithetic or self.batch_size % 4 == 0, PAIRS),
            ("rwp_start", self.rwp_start < 1, f"below 1: {plain}"),
            ("rwp_alpha", self.rwp_alpha > 0, f"above 0: {plain}"),
            ("rwp_gamma", self.rwp_gamma != 0, f"above 0: {plain}"),
            ("model_kwargs", isinstance(yaml.safe_load(self.model_kwargs), dict), "a mapping, {name: value}"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "at least 0 and less than epochs"),
        )
