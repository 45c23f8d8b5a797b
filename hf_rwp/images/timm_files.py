"""Which models timm has, as its files say: importing it takes seconds."""

import difflib
import importlib.util
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path


def similar_in_files(name: str) -> list[str] | None:
    """Names of models like one that none of timm's files has; None where one has it, and timm itself must say."""
    spec, stem = importlib.util.find_spec("timm"), name.split(".")[0].lower()
    if spec is None or spec.origin is None or ":" in name:
        return None
    text = "".join(
        file.read_text(encoding="utf-8") for file in sorted((Path(spec.origin).parent / "models").glob("*.py"))
    )
    if not stem or re.search(rf"\bdef {re.escape(stem)}\(|['\"]{re.escape(stem)}(\.\w+)?['\"]\s*:", text):
        return None
    weights = Counter(re.findall(rf"['\"]({re.escape(stem)}\w*)\.\w+['\"]", text))
    return nearest(stem, sorted(re.findall(r"^@register_model\s+def (\w+)\(", text, re.MULTILINE)), weights)


def nearest(stem: str, models: Sequence[str], weights: Mapping[str, int]) -> list[str]:
    """Up to five like `stem`; of longer names, short ones with much in weights come first. weights: how many it has."""
    longer = [one for one in models if stem and one.startswith(stem)]
    if not longer:
        return similar(stem, models)
    return sorted(longer, key=lambda one: -weights.get(one, 0) / len(one) ** 2)[:5]


def similar(name: str, known: Sequence[str]) -> list[str]:
    """Up to five: those of the known names that begin as `name` does, else those that are spelled alike."""
    longer = [one for one in known if one.startswith(name.lower())]
    return difflib.get_close_matches(name.lower(), longer or known, 5, cutoff=0)


def no_model(flag: str, name: str, names: Sequence[str]) -> str:
    """What to say of a name that timm does not have. names: similar ones."""
    return f"{flag} must be one of timm's models, got {name!r}{told(names)}"


def told(names: Sequence[str]) -> str:
    return f"; did you mean {names[0]}?" if len(names) == 1 else f". Similar names: {', '.join(names)}"
