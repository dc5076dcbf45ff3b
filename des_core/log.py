"""key=value lines: one event a line, read by people, by grep and by our own launcher."""

from __future__ import annotations

import shlex
import sys
from typing import TextIO

from des_core.secrets import hidden


def format_event(event: str, **fields: object) -> str:
    """``event=NAME key=value ...``; values with spaces are quoted, floats get six digits."""
    parts = [f"event={event}"]
    for key, value in fields.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        parts.append(f"{key}={shlex.quote(hidden(text))}")
    return " ".join(parts)


def emit(event: str, *, to: TextIO | None = None, **fields: object) -> None:
    """Write one event line to ``to`` (standard error by default) and flush."""
    print(format_event(event, **fields), file=to or sys.stderr, flush=True)


def byte_text(size: float) -> str:
    """Bytes in the largest unit that keeps a digit before the point, such as 1.25 MB."""
    for unit in ("B", "kB", "MB"):
        if abs(size) < 999.5:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def parse_event(line: str) -> dict[str, str]:
    """The fields of an event line, ``event`` among them; empty for any other line."""
    if not line.startswith("event="):
        return {}
    try:
        words = shlex.split(line)
    except ValueError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)
