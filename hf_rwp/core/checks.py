"""Values that users give, checked where they live."""

from collections.abc import Callable
from typing import Any


def check(name: str, value: Any, kind: type, valid: Callable[[Any], bool], valid_range: str) -> None:
    """Raise ValueError by name where a value is of another kind or out of range."""
    if not (isinstance(value, kind) and valid(value)):
        raise ValueError(f"{name}={value!r} is out of range: it must be {valid_range}")
