"""Values that users give, checked where they live."""

from collections.abc import Callable
from typing import Any


def check(name: str, value: Any, kind: type | tuple[type, ...], valid: Callable[[Any], bool], valid_range: str) -> None:
    """Raise ValueError by name where a value is of another kind or out of range."""
    if not (isinstance(value, kind) and valid(value)):
        raise ValueError(f"{name} must be {valid_range}, got {value!r}")


def check_all(holder: object, *rules: tuple[str, Any, str]) -> None:
    """Raise ValueError for the first attribute of `holder` that breaks a rule: (name, whether it is valid, range)."""
    for name, valid, valid_range in rules:
        if not valid:
            raise ValueError(f"{name} must be {valid_range}, got {getattr(holder, name)!r}")
