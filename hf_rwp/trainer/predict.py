"""`hf-rwp predict MODEL IMAGE...`: what a trained classifier sees in images, with how much certainty.

On a terminal a line for each image, cut to its width; in a pipe tabs between image, class, probability, class, ..., and
nothing is cut; with `--json` an object a line. What cannot be read is named on stderr, and the exit status is then 1.
"""

import argparse
import glob
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from hf_rwp.images.weights import find_weights
from hf_rwp.runs.mistakes import Parser, tell
from hf_rwp.runs.started import announce

EPILOG = """\
examples:
  hf-rwp predict outputs/digits_rwp_seed0 photo.jpg
  hf-rwp predict outputs/pets_rwp_seed0 photos/ 'more/*.png' --top_k 1
  hf-rwp predict timm/resnet18.a1_in1k photos/ --json > predictions.jsonl
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="hf-rwp predict",
        description="The most probable classes of images; in a pipe with tabs between the fields:\n"
        "image, class, probability, class, probability, ...",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="the folder of a run or of a model, or an id on the Hub")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="images, folders of them, or patterns in quotes")
    parser.add_argument("--top_k", type=int, default=5, metavar="K", help="classes for each image (5)")
    parser.add_argument("--json", action="store_true", help="an object a line, in place of text")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="images at a time (32)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto is a GPU where there is one")
    options = parser.parse_args(argv)
    for name in ("top_k", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    found, failed = find_images(options.images)
    for name, reason in failed.items():
        tell(f"error: {name}: {reason}")
    printed = printer(found, sys.stdout, options.json)
    try:
        for image, result in predictions(options.model, found, options.top_k, options.batch_size, options.device):
            if isinstance(result, str):
                failed[image] = result
                tell(f"error: {image}: {result}")
            printed(image, result)
    except BrokenPipeError:  # whoever reads has enough, as `head`
        sys.stdout = None  # type: ignore[assignment]  # else Python flushes it at its end, and says so
        raise SystemExit(141) from None
    if failed:
        raise SystemExit(1)


def find_images(named: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The paths of images, each once, in the order in which they were named; and for other names why there are none.

    named: files, which are taken to be images whatever they are called; folders, with all below them; patterns.
    """
    found: dict[str, None] = {}
    failed: dict[str, str] = {}
    for name in named:
        path = Path(name).expanduser()
        if path.is_dir():
            inside, others = images_below(path)
            reason = f"no images in this folder, but {others}"
        elif path.exists():
            inside = [str(path)]
        elif glob.has_magic(name):
            matches = sorted(glob.glob(str(path), recursive=True))
            inside = [image for match in matches for image in images_of_match(Path(match))]
            reason = f"no image matches, of {len(matches)} files that do" if matches else "nothing matches"
        else:
            inside, reason = [], "there is no such file or folder"
        if not inside:
            failed[name] = reason
        found |= dict.fromkeys(inside)
    return list(found), failed


def images_below(folder: Path) -> tuple[list[str], str]:
    """The images in a folder and below, and what else there is, in words."""
    from hf_rwp.images.files import scan

    tree = scan(folder)
    return [str(place.path / image) for place in tree.walk() for image in place.images], tree.others_below()


def images_of_match(path: Path) -> list[str]:
    from hf_rwp.images.pixels import ending_of, image_endings

    if path.is_dir():
        return images_below(path)[0]
    return [str(path)] if ending_of(path.name) in image_endings() else []


def predictions(
    model: str, images: Sequence[str], top_k: int, batch_size: int, device: str
) -> Iterator[tuple[str, list[tuple[str, float]] | str]]:
    """For each image its most probable classes, with probabilities in [0, 1]; or why it could not be read.

    Raises ValueError for a model that cannot be loaded, which is not tried where there are no images.
    """
    if not images:
        return
    find_weights(model, "MODEL")  # ahead of imports that take seconds
    if sys.stderr.isatty():
        announce("predict")
    import torch
    from transformers.utils import logging

    from hf_rwp.trainer.classifiers import classes_of, load_classifier, prepared

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    classifier, processor = load_classifier(model, "MODEL")
    names, accelerator = classes_of(classifier), torch.accelerator.current_accelerator(check_available=True)
    target = torch.device("cpu") if device == "cpu" or accelerator is None else accelerator
    network: Any = classifier.to(target)  # type: ignore[arg-type]
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        read = {image: pixels_of(image, partial(prepared, processor)) for image in batch}
        inputs = [pixels for pixels in read.values() if not isinstance(pixels, str)]
        rows: Iterator[torch.Tensor] = iter(())
        if inputs:
            with torch.inference_mode():
                rows = iter(network(pixel_values=torch.stack(inputs).to(target)).logits.double().softmax(1).cpu())
        for image, pixels in read.items():
            yield image, pixels if isinstance(pixels, str) else most_probable(next(rows), names, top_k)


def pixels_of(image: str, transform: Callable[[Any], Any]) -> Any:
    """What the transform makes of a file's image in RGB, or in words why there is none."""
    from hf_rwp.images.pixels import decoded, why_unreadable

    try:
        return transform(decoded({"path": None, "bytes": Path(image).read_bytes()}))
    except Exception as error:  # decoders raise nearly anything
        return why_unreadable(error)


def most_probable(probabilities: Any, names: Sequence[str], top_k: int) -> list[tuple[str, float]] | str:
    """The classes with the highest of the probabilities (C,); in words why not, where these are no numbers."""
    highest = probabilities.topk(min(top_k, len(names)))
    found = [
        (names[index], value) for value, index in zip(highest.values.tolist(), highest.indices.tolist(), strict=True)
    ]
    if not all(math.isfinite(value) for _, value in found):
        return "the model's outputs are not finite numbers: its weights are damaged"
    return found


def printer(images: Sequence[str], out: TextIO, as_json: bool) -> Any:
    """What prints an image's result, a list of (class, probability) or the words of a failure."""
    width = shutil.get_terminal_size((80, 24)).columns if out.isatty() else 0
    column = min(max(map(len, images), default=0), width * 2 // 5)

    def show(image: str, result: list[tuple[str, float]] | str) -> None:
        if as_json:
            labels = {"error": result} if isinstance(result, str) else {"predictions": scores(result)}
            print(json.dumps({"image": image, **labels}), file=out, flush=True)
        elif not isinstance(result, str):
            print(line(image, result, width, column), file=out, flush=True)

    return show


def scores(result: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """By the names that transformers' pipelines have."""
    return [{"label": label, "score": score} for label, score in result]


def line(image: str, result: Sequence[tuple[str, float]], width: int, column: int) -> str:
    """An image and its classes. width: of the terminal, 0 in a pipe. column: of the image's name."""
    image, labels = one_line(image), [(one_line(label), score) for label, score in result]
    if not width:
        return "\t".join([image, *(part for label, score in labels for part in (label, f"{score:.6f}"))])
    text = f"{image if len(image) <= column else '…' + image[1 - column :]:<{column}}"
    for number, (label, score) in enumerate(labels):
        share = f" {100 * score:.1f} %"
        room = width - len(text) - 2 - len(share)
        if len(label) > room and (number or room < 2):
            break
        text += f"  {label if len(label) <= room else label[: room - 1] + '…'}{share}"
    return text


def one_line(text: str) -> str:
    """A name without tabs and line ends, which part fields and images."""
    return " ".join(text.split())
