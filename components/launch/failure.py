"""Why workers ended, as one error of one line."""

from __future__ import annotations

import re
import signal

from des_core.errors import DesError, KilledError, UserError, WorkerError, error_of


def launch_error(report: dict[str, object] | None, output: str, where: str) -> DesError | None:
    """The error of a failed launch, or None if no process left a message.

    The user's mistake comes first, then a killed worker, then what a worker reported, then its traceback.

    Args:
        report: code and message that a worker left.
        output: all that torchrun and the workers printed.
        where: where it happened, and what to do.
    """
    reported = error_of(str(report["code"]), str(report["message"])) if report else None
    if isinstance(reported, UserError):
        return reported
    killed = killed_worker(output)
    if killed:
        worker, name = killed
        return KilledError(
            f"worker {worker} was killed ({name}{'; out of memory?' if name == 'SIGKILL' else ''}) {where}"
        )
    if reported:
        return type(reported)(f"{reported} {where}")
    # A worker that fails before it can report, in an import, has left no more than its traceback. Once the workers
    # have met, torch puts "[rank0]: " before each line. torchrun's own error says no more than that there was one.
    crash = re.search(
        r"^(?:\[rank(\d+)\]: )?(?!torch\.distributed\.elastic)(\w[\w.]*(?:Error|Exception)\b.*)$", output, re.MULTILINE
    )
    if crash:
        who = f"worker {crash[1]}" if crash[1] else "a worker"
        return WorkerError(f"{who} crashed ({crash[2][:200]}) {where}")
    return None


def killed_worker(output: str) -> tuple[int, str] | None:
    """Worker and signal that torchrun's summary of failures names; SIGTERM only where no other failure explains it."""
    # torchrun writes no file about a worker that a signal ended, only this summary.
    found = re.findall(r"rank\s*:\s*(\d+)\s*\(local_rank:.*?exitcode\s*:\s*(-?\d+)", output, re.DOTALL)
    signals = [(int(worker), signal.Signals(-int(code)).name) for worker, code in found if int(code) < 0]
    # torchrun itself ends those that are left with SIGTERM.
    ended = signals[0] if len(signals) == len(found) and signals else None
    return next((pair for pair in signals if pair[1] != "SIGTERM"), ended)
