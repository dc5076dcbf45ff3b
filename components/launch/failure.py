"""One line that says why workers ended."""

from __future__ import annotations

import re
import signal

from des_core.errors import DesError, UserError, WorkerError


def launch_error(error: dict[str, object] | None, output: str, where: str) -> DesError:
    """One line for a failed launch: the user's mistake first, then a killed worker, then a worker's own words.

    Args:
        error: what a worker left in DES_ERROR_FILE.
        output: all that torchrun and the workers printed.
        where: where it happened, and what to do.
    """
    if error and error["code"] == UserError.exit_code:
        return UserError(str(error["message"]))
    killed = killed_worker(output)
    if killed:
        worker, name = killed
        return WorkerError(
            f"worker {worker} was killed ({name}{'; out of memory?' if name == 'SIGKILL' else ''}) {where}"
        )
    if error:
        return WorkerError(f"{error['message']} {where}")
    # torch puts "[rank0]: " before the lines of a traceback once the workers have met.
    crash = re.search(r"^(?:\[rank(\d+)\]: )?(\w[\w.]*(?:Error|Exception)\b.*)$", output, re.MULTILINE)
    if crash:
        who = f"worker {crash[1]}" if crash[1] else "a worker"
        return WorkerError(f"{who} crashed ({crash[2][:200]}) {where}")
    return WorkerError(f"the workers ended without a word {where}")


def killed_worker(output: str) -> tuple[int, str] | None:
    """Worker and signal that torchrun's summary of failures names; SIGTERM only where no other failure explains it."""
    found = re.findall(r"rank\s*:\s*(\d+)\s*\(local_rank:.*?exitcode\s*:\s*(-?\d+)", output, re.DOTALL)
    signals = [(int(worker), signal.Signals(-int(code)).name) for worker, code in found if int(code) < 0]
    # torchrun itself ends those that are left with SIGTERM.
    ended = signals[0] if len(signals) == len(found) and signals else None
    return next((pair for pair in signals if pair[1] != "SIGTERM"), ended)
