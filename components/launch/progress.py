"""Progress of the workers: a bar on a terminal, key=value lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from des_core import log

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

FLEETING = ("step", "evaluate")
"""Events of which only the latest matters."""


class Progress:
    """Shows the event lines of worker 0 on standard error.

    Args:
        every_s: without a terminal, seconds between two fleeting lines; 0 shows all.
    """

    def __init__(self, every_s: float = 0.0) -> None:
        self._every_s = every_s
        self._shown = -every_s
        self._auc = ""
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def show(self, event: dict[str, str]) -> None:
        """Take one parsed event line."""
        if self._terminal:
            self._draw(event)
            return
        now = time.monotonic()
        last = event["event"] == "step" and event.get("step") == event.get("of")
        if event["event"] not in FLEETING or last or now - self._shown >= self._every_s:
            self._shown = now
            log.emit(**event)  # type: ignore[arg-type]

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _draw(self, event: dict[str, str]) -> None:
        if event["event"] == "valid" and "auc" in event:
            self._auc = f"  valid AUC {float(event['auc']):.4f}"
        if event["event"] not in FLEETING or "of" not in event:
            return
        if event["event"] == "step":
            what, done = "train", int(event["step"])
            said = f"epoch {event.get('epoch', '?')}  loss {float(event.get('loss', 'nan')):.4f}{self._auc}"
            said += f"  {float(event.get('samples_per_s', 0)):,.0f} samples/s  {_clock(event.get('eta_s', '0'))} left"
        else:
            what, done, said = "score", int(event["done"]), event.get("split", "")
        if self._bar is None:
            self._open(what)
        assert self._bar is not None and self._task is not None
        self._bar.update(self._task, description=what, total=int(event["of"]), completed=done, said=said)
        if not self._bar.live.is_started:
            self._bar.start()

    def _open(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
        )
        console = Console(stderr=True)
        # Whoever has redirected the standard streams keeps them.
        self._bar = Bar(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task(what, said="")


def _clock(seconds: str) -> str:
    whole = max(0, round(float(seconds)))
    return f"{whole // 60}:{whole % 60:02d}"
