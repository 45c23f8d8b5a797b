"""Lines and tables that a terminal shows without wrapping them; a pipe gets them whole."""

import shutil
import sys
import textwrap
from collections.abc import Sequence


def columns() -> int | None:
    """Of the terminal that stdout is; None where it is none."""
    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else None


def fitted(text: str, indent: str = "  ") -> str:
    """Text of which no line is wider than the terminal: lines that are go on in indented ones."""
    width = columns()
    if width is None:
        return text
    lines = []
    for line in text.splitlines():
        room = width - max(map(len, line.split()), default=0)
        own = indent if len(indent) <= room else "  "
        lines += textwrap.wrap(line, width, subsequent_indent=own, break_on_hyphens=False) or [""]
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns below their heads, each row's name in front. Where a terminal is too narrow for all of them, the
    rest comes in a table of its own below, with the names again."""
    widths, room = [max(map(len, column)) for column in zip(*rows, strict=True)], columns()
    parts, used = [list[int]()], widths[0]
    for index, width in enumerate(widths[1:], start=1):
        if room is not None and parts[-1] and used + 2 + width > room:
            parts.append([])
            used = widths[0]
        parts[-1].append(index)
        used += 2 + width
    return "\n\n".join(
        "\n".join("  ".join(row[index].ljust(widths[index]) for index in (0, *part)).rstrip() for row in rows)
        for part in parts
    )
