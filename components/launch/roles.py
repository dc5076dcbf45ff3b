"""The roles of workers, and the function that launches them."""

from __future__ import annotations

import os
from typing import Literal

from des_core.run import Run

Role = Literal["train", "evaluate", "score"]


MODULES: dict[str, str] = {
    "train": "des_core.engine.trainer",
    "evaluate": "des_core.engine.evaluator",
    "score": "des_core.engine.progressive",
}


LEAVING = "leaving"
"""The event of a worker whose role is done, after all workers have met for the last time."""


LEAVE_S = 30.0
"""For processes to end once their work is done."""


def pace() -> float:
    """Seconds between two lines of progress where there is no terminal; the local pipeline draws its own bar."""
    return 0.0 if os.environ.get("DES_LOCAL_RUN") else 10.0


def log_file(run: Run, role: str) -> str:
    """Path of a role's full output: beside the run's results, or in run.dir where these are not local."""
    folder = run.config.run.dir if "://" in run.folder else run.folder
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f"{role}.log")


def launch(role: Role, run: Run, resume: bool = False, module: str = "") -> None:
    """Run a role on ``train.workers`` workers, local or on the cluster by cluster.backend, until they are done.

    Args:
        module: the workers' module, if not the role's own.

    Raises:
        DesError: a worker failed; UserError where it is the user's to mend.
    """
    if run.config.cluster.backend == "pytorchjob":
        from components.launch import cluster

        cluster.launch(role, run, resume, module)
    else:
        from components.launch import local

        local.launch(role, run, resume, module)
