"""A step at run time: its run, how it tells that it is done, and how it fails.

Apart from ``_step``, because kfp has no decorators where a step runs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from components._stages import Done
from des_core import log, storage
from des_core.config import Config, parse_config
from des_core.contracts import Reference
from des_core.errors import DesError
from des_core.run import Run, pin


def on_config(name: str, stage: Callable[[Config], Done], config: str) -> Done:
    """Do a stage that comes before there are data."""
    return _told(name, config, stage)


def on_run(name: str, stage: Callable[[Run], Done], config: str, dataset: str, *inputs: str) -> Done:
    """Do a stage of the run that ``config`` and ``dataset`` pin, after checking its ``inputs``' digests."""

    def checked(parsed: Config) -> Done:
        for reference in inputs:
            Reference.parse(reference).read()
        return stage(pin(parsed, Reference.parse(dataset)))

    return _told(name, config, checked)


def copy_page(page: str, path: str) -> None:
    """Put a run's page where KFP shows it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(storage.read_bytes(page))


def _fail(root: str, name: str, code: int, message: str) -> NoReturn:
    if root:
        with contextlib.suppress(OSError):
            storage.write_json(storage.join(root, "error.json"), {"step": name, "code": code, "message": message})
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _told(name: str, config: str, stage: Callable[[Config], Done]) -> Done:
    """Do a stage; leave ``error.json`` and the exit code of what went wrong."""
    start = time.monotonic()
    log.emit("start", name=name)
    root = ""
    try:
        parsed = parse_config(config, "the config of this pipeline")
        root = parsed.storage.root
        done = stage(parsed)
    except DesError as error:
        _fail(root, name, error.exit_code, str(error))
    except Exception as error:
        traceback.print_exc()
        _fail(root, name, 1, f"{name}: unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    seconds = round(time.monotonic() - start, 1)
    log.emit("done", name=name, seconds=seconds, unchanged=done.unchanged, what=done.what)
    return done
