"""The flags of RWP with those of `transformers.Trainer`."""

from dataclasses import dataclass

from transformers import TrainingArguments

from hf_rwp.core.arguments import RWPArguments


@dataclass
class RWPTrainingArguments(RWPArguments, TrainingArguments):
    """`TrainingArguments` with the flags of [`RWPArguments`], for [`RWPTrainer`]."""
