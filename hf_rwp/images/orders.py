"""The classes of the data in the order of the weights that are evaluated on them.

Class folders have no order of their own: timm numbers them in natural order (0, 1, 2, 10), the scripts of transformers
and torchvision in plain order (0, 1, 10, 2). Weights that name their classes leave nothing to guess.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from hf_rwp.images.found import Found, ImageSplits, found_in, listed
from hf_rwp.images.numbering import labels_of, renumbered, with_column


def class_names(config: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes in the order of the logits, None where the weights do not tell them."""
    named = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    if named:
        return list(map(str, named))
    by_number = config.get("id2label") or {}
    names = [str(by_number[number]) for number in sorted(by_number, key=int)]
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    return None if unnamed else names


def in_order_of(splits: Any, weights: str | None, config_of: Callable[[str], Mapping[str, Any]]) -> Any:
    """`splits` with their classes numbered as the weights do, for an evaluation.

    weights: what they are called; None changes nothing. config_of: what their config.json says, empty if that is not
    known. Where they name their classes, the data may have a part of them. Where they do not, the order is that in
    which their library sorts folders, and what was found says so. Raises ValueError for other classes, and
    for a stream that would need another order.
    """
    if weights is None:
        return splits
    config = config_of(weights)
    found, names = found_in(splits), splits["train"].features["label"].names
    theirs = class_names(config)
    twice = [name for name, count in Counter(theirs or ()).items() if count > 1]  # as ImageNet's two cranes
    if theirs == names:
        return splits
    if theirs is None:
        transformers = bool(config) and "architecture" not in config
        theirs = sorted(names) if transformers else names
        how = "plain order, as transformers' scripts sort" if transformers else "natural order, as timm sorts"
        found.note(
            f"{weights} does not name the classes of its weights: those of the data are taken in {how} "
            f"folders ({listed(theirs)})"
        )
    elif len(theirs) == len(names) and (twice or not set(theirs) & set(names)):
        how = f"name {listed(twice)} more than once" if twice else f"have other names ({listed(theirs, 3)})"
        found.note(f"the classes of {weights} {how}, and the data's are {listed(names, 3)}: they are matched by place")
        theirs = names
    if theirs == names:
        return splits
    unknown = [name for name in names if name not in theirs or name in twice]
    if unknown:
        raise ValueError(
            f"{weights} has no class {listed(unknown)}, of the {len(names)} in the data: it has {listed(theirs)}. An "
            "evaluation needs classes that the weights were trained for: name their data, --data_dir or --dataset"
        )
    return _in_order(splits, names, theirs, found)


def _in_order(splits: Any, names: Sequence[str], theirs: Sequence[str], found: Found) -> Any:
    if not all(isinstance(split, Dataset) for split in splits.values()):
        raise ValueError(
            f"the weights number the classes as {listed(theirs)}, the data as {listed(names)}, and a stream cannot be "
            "renumbered: leave out streaming"
        )
    feature = ClassLabel(names=list(theirs))
    made = ImageSplits()
    for role, split in splits.items():
        made[role] = with_column(split, "label", renumbered(labels_of(split), names, theirs), feature)
    found.note(f"the classes are numbered as the weights name them: {listed(theirs)}")
    found.count(made)
    made.found = found
    return made
