"""What commands print: facts, one JSON object at the end, one line for an error."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from des_core.errors import DesError
from des_core.secrets import hidden
from pipelines.commands import options

if TYPE_CHECKING:
    from components.stages import Done


def show(key: str, text: str) -> None:
    """Print one fact: aligned on a terminal, key=value elsewhere."""
    print(f"{key:<9} {text}" if sys.stdout.isatty() else f"{key}={shlex.quote(text)}", flush=True)


def answer(as_json: bool, result: dict[str, Any]) -> None:
    """Print the result as JSON, if that is asked for."""
    if as_json:
        print(json.dumps(result, sort_keys=True), flush=True)


def show_step(name: str, done: Done, as_json: bool) -> None:
    """Print the outcome of one step."""
    show(name, ("unchanged: " if done.unchanged else "") + done.what)
    if done.page:
        show("report", done.page)
    page = {"report": done.page} if done.page else {}
    facts = {"command": name, "unchanged": done.unchanged, "reference": done.reference}
    answer(as_json, facts | page | done.numbers)


def fail(as_json: bool, error: DesError) -> int:
    """Print an error as one line without secrets, and return its exit code."""
    line = hidden(" ".join(str(error).split()))
    print(f"error: {line}", file=sys.stderr, flush=True)
    answer(as_json, {"error": line, "code": error.code, "exit_code": error.exit_code})
    return error.exit_code


def crash(error: Exception) -> DesError:
    """An unexpected error as one line; its traceback goes to a file."""
    folder = options.crash_folder if os.path.isdir(options.crash_folder) else tempfile.gettempdir()
    path = os.path.join(folder, "crash.log")
    message = f"unexpected {type(error).__name__}: {str(error)[:300]}"
    try:
        Path(path).write_text(hidden(traceback.format_exc()), encoding="utf-8")
    except OSError as second:
        return DesError(f"{message}; its traceback could not be written ({second.strerror})")
    return DesError(f"{message}; the full traceback is in {path}")
