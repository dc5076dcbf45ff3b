"""What ``des run`` and ``des plan`` show: short lines for a terminal, key=value for anything else."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from des_core import log, storage
from des_core.log import byte_text
from des_core.release.registry.lineage import Link
from des_core.release.registry.registration import Registered
from des_core.run import Run
from des_core.secrets import hidden
from des_core.verdict import Verdict


def step_teller(out: TextIO) -> Callable[[dict[str, str]], None]:
    """Writes one line per step to ``out``: its name when it starts, the rest when it is done."""
    terminal = out.isatty()

    def tell(event: dict[str, str]) -> None:
        if event["event"] == "done":
            text = f"{event['name']:<9}{float(event['seconds']):>7.1f} s  {event['what']}"
            fields = {key: value for key, value in event.items() if key != "event"}
            print(text if terminal else log.format_event("done", **fields), file=out, flush=True)
        elif terminal:
            # What comes next, the bar or the finished line, is written over it.
            print(event["name"], end="\r", file=out, flush=True)

    return tell


def of_run(run: Run, unchanged: bool) -> dict[str, Any]:
    """A registered run's result, read from its files."""
    config = run.config
    record = Registered.load(run.reference("version.json"))
    verdict = Verdict.load(run.reference("gate.json"))
    report = storage.read_json(run.path("report.json"))
    keys = ("auc", "logloss", "rmse", "samples")
    day = {} if run.day is None else {"as_of": run.day.as_of, "days": sorted(run.day.days), "parent": run.day.champion}
    return {
        "name": record.name,
        **day,
        "version": int(record.version),
        "aliases": list(record.aliases),
        "unchanged": unchanged,
        "verdict": verdict.verdict,
        "reasons": list(verdict.reasons),
        **{key: report[key] for key in keys if report.get(key) is not None},
        "run_key": run.key,
        "report": storage.join(config.storage.root, "report.html"),
        "predictions": storage.join(config.storage.root, "predictions"),
        "mlflow_ui": mlflow_ui(config.registry.tracking_uri),
    }


def show_days(results: list[dict[str, Any]]) -> None:
    """One line per day: what became of it."""
    for result in results:
        auc = f"  AUC {result['auc']:.4f}" if "auc" in result else ""
        version = f"  version {result['version']}" if "version" in result else ""
        line = f"{result['as_of']}  {result['verdict']:<14}{version}{auc}"
        if sys.stdout.isatty():
            print(line)
        else:
            facts = {key: result[key] for key in ("as_of", "verdict", "version", "auc") if key in result}
            print(log.format_event("day", **facts))
    sys.stdout.flush()


def mlflow_ui(tracking_uri: str) -> str:
    """The address of a server's page, or the command that shows a database."""
    if tracking_uri.startswith("http"):
        return hidden(tracking_uri)
    # Whoever only typed "make run" has no mlflow on the PATH.
    program = os.path.join(os.path.dirname(sys.executable), "mlflow")
    near = os.path.relpath(program)
    shown = near if not near.startswith("..") else program
    if shutil.which("mlflow") == program:
        shown = "mlflow"
    return f"{shlex.quote(shown)} ui --backend-store-uri {shlex.quote(hidden(tracking_uri))}"


def tell(result: dict[str, Any]) -> None:
    """Print a run's result, and last where to look."""
    if result["verdict"] == "absent":
        print(log.format_event("absent", as_of=result["as_of"], why="; ".join(result["reasons"])))
        return
    aliases = ", ".join(result["aliases"]) or "no alias any more"
    version = f"unchanged, version {result['version']}" if result["unchanged"] else f"version {result['version']}"
    metric = ("test AUC", "auc") if "auc" in result else ("test RMSE", "rmse")
    lines = [
        *([("day", f"{result['as_of']}, from {result['parent'] or 'nothing'}")] if "as_of" in result else []),
        ("model", f"{result['name']} {version} ({aliases})"),
        (metric[0], f"{result[metric[1]]:.4f}" if metric[1] in result else "none"),
        ("verdict", f"{result['verdict']}: {'; '.join(result['reasons'])}"),
        ("report", result["report"]),
        ("mlflow ui", result["mlflow_ui"]),
    ]
    for key, text in lines:
        if sys.stdout.isatty():
            print(f"{key:<10}{text}")
        else:
            print(f"{key.replace(' ', '_').lower()}={shlex.quote(text)}")
    sys.stdout.flush()


def show_plan(plan: dict[str, Any]) -> None:
    """Print a plan: tables on a terminal, one line per fact elsewhere."""
    if not sys.stdout.isatty():
        for operator in plan["operators"]:
            sizes = {f"{kind}_bytes": size for kind, size in operator["alternatives"].items()}
            print(
                log.format_event(
                    "operator", name=operator["name"], width=operator["width"], **sizes, chosen=operator["chosen"]
                )
            )
        for rank, joint in enumerate(plan["joint"]):
            choice = ",".join(f"{name}:{kind}" for name, kind in joint["choice"].items())
            numbers = {key: value for key, value in joint.items() if key != "choice"}
            print(log.format_event("joint", rank=rank + 1, choice=choice, **numbers))
        for row in plan["placement"]:
            print(log.format_event("worker", **{**row, "fields": ",".join(row["fields"])}))
        for row in plan["memory"]["workers"]:
            print(log.format_event("memory", **row))
        print(log.format_event("steps", **plan["memory"]["steps"]))
        print(log.format_event("limit", **plan["memory"]["limit"]))
        return
    _plan_tables(plan)


def show_chain(links: Sequence[Link]) -> None:
    """Print a version and its parents, newest first: aligned on a terminal, one line each elsewhere."""
    if not sys.stdout.isatty():
        for link in links:
            days = {"days": ",".join(f"{day}={sha256}" for day, sha256 in link.days.items())}
            facts = link.model_dump() | {"aliases": ",".join(link.aliases)} | days
            print(
                log.format_event("version", **{key: value for key, value in facts.items() if value not in (None, "")})
            )
        return
    rows = [("version", "as of", "trained through", "verdict", "test", "aliases", "data", "code", "parent")]
    for link in links:
        metric = link.test_auc if link.test_auc is not None else link.test_rmse
        data = link.dataset.rpartition(":")[2][:12] + (f" ({len(link.days)} days)" if link.days else "")
        through = link.trained_through[:19].replace("T", " ")
        measured = "" if metric is None else f"{metric:.4f}"
        made = (", ".join(link.aliases), data, link.git_commit[:12], link.parent_version or "none")
        rows.append((link.version, link.as_of, through, link.verdict, measured, *made))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    first = links[0]
    for key in ("run_key", "config_digest", "seed", "git_commit", "image", "environment", "dataset", "mlflow_run"):
        if getattr(first, key):
            print(f"{key.replace('_', ' '):<14} {getattr(first, key)}")


def show_profile(phases: dict[str, float]) -> None:
    """Print a step's phases in milliseconds: a table on a terminal, one line elsewhere."""
    if not sys.stdout.isatty():
        print(log.format_event("profile", **{f"{phase}_ms": round(ms, 3) for phase, ms in phases.items()}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("phase", title="one step, worker 0", title_justify="left")
    table.add_column("ms", justify="right")
    for phase, ms in phases.items():
        table.add_row(phase, f"{ms:.3f}")
    Console().print(table)


def _plan_tables(plan: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    head = f"{plan['workers']} workers, {plan['batch']:,} samples per step; bytes per worker per step, both ways"
    operators = Table("operator", "width P", title=head, title_justify="left")
    for column in ("sum", "gather", "rows", "chosen"):
        operators.add_column(column, justify="left" if column == "chosen" else "right")
    for row in plan["operators"]:
        known = row["alternatives"]
        sizes = [byte_text(known[kind]) if kind in known else "" for kind in ("sum", "gather", "rows")]
        operators.add_row(row["name"], str(row["width"]), *sizes, row["chosen"])
    joint = Table(
        "joint choice", "upper part", title="all operators together, the cheapest first", title_justify="left"
    )
    for column in ("bytes per step", "collectives", *(["ms per step"] if "ms_per_step" in plan["joint"][0] else [])):
        joint.add_column(column, justify="right")
    for row in plan["joint"]:
        choice = ", ".join(f"{name}: {kind}" for name, kind in row["choice"].items())
        time = [f"{row['ms_per_step']:.2f}"] if "ms_per_step" in row else []
        joint.add_row(choice, row["upper"], byte_text(row["bytes_per_step"]), str(row["collectives"]), *time)
    workers = Table("worker", "fields", title="who owns what", title_justify="left")
    for column in ("lookups", "bytes", "rows"):
        workers.add_column(column, justify="right")
    for row in plan["placement"]:
        shares = [f"{100 * row[key]:.1f} %" for key in ("lookups_share", "bytes_share")]
        workers.add_row(str(row["worker"]), ", ".join(row["fields"]), *shares, f"{row['rows']:,}")
    for table in (operators, joint, workers, *_memory_tables(plan["memory"])):
        console.print(table)
    limit = plan["memory"]["limit"]
    may = f"each may have {byte_text(limit['bytes'])} ({limit['why']})" if limit["bytes"] else "nothing limits them"
    fits = "" if limit["fits"] else ", which is too little: des run refuses this"
    console.print(f"workers need up to {byte_text(plan['memory']['most'])} each, {may}{fits}")


def _memory_tables(memory: dict[str, Any]) -> list[Any]:
    """What each worker is predicted to hold, by part and by role, and what other steps take."""
    from rich.table import Table

    names = [name for name in memory["workers"][0] if name not in ("worker", "rows_owned")]
    workers = Table("worker", title="memory of each worker: parts in training, then the roles", title_justify="left")
    for name in names:
        workers.add_column(name, justify="right")
    for row in memory["workers"]:
        workers.add_row(str(row["worker"]), *(byte_text(row[name]) for name in names))
    steps = Table(title="memory of steps that are one process, to about a third", title_justify="left")
    for name in memory["steps"]:
        steps.add_column(name, justify="right")
    steps.add_row(*(byte_text(size) for size in memory["steps"].values()))
    return [workers, steps]
