"""Trained image classifiers, timm's and transformers', each with the preprocessing that its own files say."""

from typing import Any

import PIL.Image
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from hf_rwp.images.weights import find_weights


def load_classifier(named: str, flag: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier in float32, on the CPU and in eval mode, and its preprocessing.

    named: the folder of a run or of a model, or an id on the Hub; nothing is asked of the Hub for what is here. flag:
    what an error calls it. Raises ValueError where there is none, and where a part of it has no trained weights.
    """
    source = find_weights(named, flag)
    if source.is_file:
        raise ValueError(
            f"{flag}={named!r} is a file of weights, which does not say what model they are of: name a folder with a "
            "config.json"
        )
    place, local = str(source.path or source.hub_id), source.path is not None
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True, local_files_only=local
        )
        # As in an evaluation, which reads and resizes images by Pillow.
        processor = AutoImageProcessor.from_pretrained(place, backend="pil", local_files_only=local)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{flag}={named!r} could not be loaded: {error}. Name a folder that holds an image classifier, such as "
            "outputs/RUN, or the id of one on the Hub, and check the connection and your access (`hf auth login`)"
        ) from error
    if loading["missing_keys"]:
        raise ValueError(
            f"{named} has no trained weights for {', '.join(sorted(loading['missing_keys'])[:3])}: an image classifier "
            "with its head is needed, not a backbone"
        )
    return model.eval(), processor


def classes_of(model: PreTrainedModel) -> list[str]:
    """The names of its classes, by index."""
    names: Any = model.config.id2label
    return [str(names[index]) for index in range(len(names))]


def prepared(processor: BaseImageProcessor, image: PIL.Image.Image) -> Tensor:
    """An RGB image as the model takes it, (3, H, W)."""
    pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return pixels
