"""From the bytes of an image to its pixels in RGB, and which files are images at all."""

import functools
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
from datasets import Image

# TIFF's tags for what black and white are, and how many bits a value has.
_BITS, _PHOTOMETRIC, _MAX, _SIGNED_MAX = 258, 262, 281, 341
_STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows these, and cannot read them
_MAGIC = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF")
_ENDING = re.compile(r"\.[a-z][a-z0-9_]{0,8}")
_DECODER = Image()

if importlib.util.find_spec("pillow_heif"):
    importlib.import_module("pillow_heif").register_heif_opener()


def why_unreadable(error: Exception) -> str:
    """What to say of an image that an error came of."""
    if isinstance(error, PIL.UnidentifiedImageError):  # its own words are of an object in memory
        return "UnidentifiedImageError: no image, or none of a kind that Pillow reads"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@functools.cache
def image_endings() -> frozenset[str]:
    """The endings of the files that Pillow reads here, ".jpg" and so on, in lower case."""
    endings = PIL.Image.registered_extensions()
    return frozenset(name for name, kind in endings.items() if kind in PIL.Image.OPEN and kind not in _STUBS)


def ending_of(name: str) -> str:
    """A file's ending in lower case, "" where what follows the last dot is none (photo.jpg?w=3, 0001.2)."""
    ending = os.path.splitext(name)[1].lower()
    return ending if _ENDING.fullmatch(ending) else ""


def begins_like_an_image(path: str) -> bool:
    """Whether a file's first bytes are those of a common kind of image, whatever it is called."""
    image_endings()  # fills what Pillow knows
    try:
        with open(path, "rb") as file:
            prefix = file.read(16)
    except OSError:
        return False
    accepts = [PIL.Image.OPEN[kind][1] for kind in _MAGIC if kind in PIL.Image.OPEN]
    return any(accept is not None and bool(accept(prefix)) for accept in accepts)


def decoded(encoded: Mapping[str, Any] | None) -> PIL.Image.Image:
    """The image of a row in RGB, turned as its EXIF tag says. encoded: {"path", "bytes"}.

    Raises whatever Pillow's decoders do, which is nearly anything.
    """
    if encoded is None:
        raise ValueError("the row holds no image")
    return to_rgb(_DECODER.decode_example(encoded))  # type: ignore[arg-type]


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """`image` in mode RGB; transparency is dropped.

    Values of 16 and 32 bits and floats are scaled by what the file says (Pillow by itself clips them to white). Raises
    ValueError where it does not say it and the values do not fill 16 bits, or a float's 0 to 1 or 0 to 255.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = PIL.Image.fromarray(_eight_bits(image))
    return image.convert("RGB")


def _eight_bits(image: PIL.Image.Image) -> np.ndarray:
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    least, most = values.min().item(), values.max().item()
    white = _first_number(tags.get(_SIGNED_MAX, tags.get(_MAX)))
    bits = int(_first_number(tags.get(_BITS)) or 16)
    kind = "float" if image.mode == "F" else f"{max(bits, 16)}-bit"
    advice = "the file does not say what is white: write it with 8 bits"
    if not 0 <= least <= most < np.inf:  # NaN too
        raise ValueError(f"{kind} values from {least} to {most}, and {advice}")
    if white is None and image.mode == "F":
        if most > 255:
            raise ValueError(f"{kind} values up to {most}, and {advice}")
        white = 1.0 if most <= 1 else 255.0
    if white is None and bits < 16:
        white = 2.0**bits - 1
    if white is None and most and not 2**12 <= most < 2**16:
        raise ValueError(f"{kind} values up to {most}, which do not fill 16 bits, and {advice}")
    if white is None or white == 2**16 - 1:
        eight = (values >> 8 if image.mode != "F" else values / 257).astype(np.uint8)
    else:
        eight = np.rint((values / white).clip(0, 1) * 255).astype(np.uint8)
    return 255 - eight if tags.get(_PHOTOMETRIC) == 0 else eight


def _first_number(value: Any) -> float | None:
    value = value[0] if isinstance(value, tuple) and value else value
    return float(value) if value else None
