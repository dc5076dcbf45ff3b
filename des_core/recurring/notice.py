"""Posts how a run ended to a webhook: accepted, rejected, undecided, absent or failed.

What is told is read from what the run left behind, so a run that failed half-way, or never began, is told of too.
"""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any

from des_core import log, remote, storage
from des_core.config import Config
from des_core.contracts import Reference
from des_core.errors import UnavailableError
from des_core.secrets import remember
from des_core.verdict import Verdict

TIMEOUT_S = 10.0
WAIT_S = 30.0
"""For a webhook that does not answer: the run itself is over."""


def outcome(config: Config, status: dict[str, Any], failure: str) -> dict[str, Any]:
    """The content of a notice: the run's name, day, outcome and the reasons.

    Args:
        status: what its steps returned, by name, and the ``error`` of one that failed.
        failure: what the pipeline knows of a failure, empty for none; a step's own line is better.
    """
    done, error = status["done"], status.get("error")
    told: dict[str, Any] = {"name": config.run.name, "as_of": status.get("as_of", "")}
    if failure or error:
        return told | {"outcome": "failure", "reasons": [f"{error['step']}: {error['message']}" if error else failure]}
    if "register" not in done:
        return told | {"outcome": "absent", "reasons": ["the day's logs did not come"]}
    verdict = Verdict.load(Reference.parse(done["gate"]))
    version = Reference.parse(done["register"]).read()
    return told | {
        "run_key": version["run_key"],
        "outcome": verdict.verdict,
        "reasons": list(verdict.reasons),
        "metrics": verdict.metrics,
        "version": version["version"],
        "aliases": version["aliases"],
        "report": storage.join(Reference.parse(done["register"]).uri.rpartition("/")[0], "report.html"),
    }


def post(config: Config, told: dict[str, Any]) -> None:
    """Post it where there is a webhook; one that does not answer is a line in the log and fails nothing."""
    log.emit("outcome", name=told["name"], as_of=told["as_of"], outcome=told["outcome"], why="; ".join(told["reasons"]))
    address = config.notify.webhook or os.environ.get("DES_WEBHOOK", "")
    if not address:
        return
    remember(address)
    try:
        remote.wait_for("the webhook", lambda: _send(address, told), min(WAIT_S, remote.patience_s()))
    except (UnavailableError, OSError, ValueError) as error:
        # Not the address: it may hold a token.
        log.emit("notice_failed", why=str(getattr(error, "reason", error)))


def _send(address: str, told: dict[str, Any]) -> None:
    """One attempt.

    Raises:
        UnavailableError: the webhook's server may take it later.
    """
    request = urllib.request.Request(
        address, json.dumps(told).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        if remote.passing(error):
            raise UnavailableError(str(getattr(error, "reason", error))) from None
        raise
