"""The command line ``des``: parse, load lazily, call.

Every command takes ``--json`` and then prints one JSON object as the last line of standard output. Exit codes: 0 done,
2 the user's mistake, 130 and 143 interrupted (SIGINT, SIGTERM), 1 anything else. An error is one line on standard
error.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.launch.process_tie import told_to_end
from des_core import __version__, scratch
from des_core.errors import DesError, UserError, of_system
from des_core.secrets import hidden, remember

if TYPE_CHECKING:
    from components.stages import Done
    from des_core.config import Config
    from pipelines.client import Kubeflow, Version

app = typer.Typer(
    name="des",
    help="Click models trained synchronously on several workers, from raw logs to a registered version.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Option("-c", "--config", metavar="FILE", help="The run's TOML.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value of the config; may be repeated."),
]
Host = Annotated[
    str | None, typer.Option("--host", metavar="URL", help="Kubeflow Pipelines; default: KFP_HOST. Token: KFP_TOKEN.")
]
Namespace = Annotated[
    str | None, typer.Option("--namespace", metavar="NS", help="Of the runs' pods; default: KFP_NAMESPACE.")
]
Experiment = Annotated[
    str | None, typer.Option("--experiment", metavar="NAME", help="Where runs are listed; default: run.name.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]

crash_folder = tempfile.gettempdir()
"""Where the traceback of an unexpected error goes: the run's folder, once that is known."""


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"des {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


Day = Annotated[str | None, typer.Option("--as-of", metavar="DATE", help="One day of a recurring run, or yesterday.")]


@app.command()
def run(
    config: ConfigFile,
    as_of: Day = None,
    from_: Annotated[str | None, typer.Option("--from", metavar="DATE", help="With --to: day after day.")] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="DATE", help="The last of these days.")] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Raw logs to a registered model, all steps.

    Over whole logs, or what one day or several bring.
    """
    from des_core.recurring import daily
    from pipelines import summary

    if (from_ is None) != (to is None) or (as_of and from_):
        raise UserError("give --from and --to together, or --as-of alone")
    loaded = _load(config, set_)
    if from_ is None or to is None:
        day = daily.yesterday(loaded) if as_of == "yesterday" else as_of and daily.parse_day(as_of, "--as-of")
        result = _run_once(loaded, day or "")
        summary.tell(result)
        _answer(as_json, result)
        return
    days = daily.days_between(daily.parse_day(from_, "--from"), daily.parse_day(to, "--to"))
    if not days:
        raise UserError(f"--from {from_} is later than --to {to}; give the earlier day first")
    results = []
    for day in days:
        _line("day", day)
        results.append(_run_once(loaded, day))
        summary.tell(results[-1])
    summary.show_days(results)
    _answer(as_json, {"days": results})


def _run_once(config: Config, day: str) -> dict[str, Any]:
    """The result of a run over whole logs (no day) or of a day."""
    from components import stages
    from pipelines import local, summary

    known = stages.settled(config, day)
    if known is not None:
        return summary.of_run(known, unchanged=True)
    done = local.run(config, day, summary.step_teller(sys.stdout))
    if "register" not in done:
        return {"name": config.run.name, "as_of": day, "verdict": "absent", "reasons": [done["resolve"]["what"]]}
    finished = stages.settled(config, day)
    if finished is None:
        raise DesError(
            f"all steps of {config.run.name} are done, but its results are not found under {config.storage.root}; "
            "were they changed meanwhile? Start it again"
        )
    return summary.of_run(finished, unchanged=done["register"]["unchanged"] == "True")


day_app = typer.Typer(help="Days in quarantine: what windows leave out, and why.", no_args_is_help=True)
app.add_typer(day_app, name="day")


@day_app.command(name="list")
def day_list(config: ConfigFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """The days in quarantine."""
    from des_core.recurring import daily

    held = daily.held_days(_load(config, set_))
    for day, record in held.items():
        _line(day, "; ".join(record.reasons))
    if not held:
        _line("days", "none is in quarantine")
    _answer(as_json, {"quarantined": {day: list(record.reasons) for day, record in held.items()}})


@day_app.command(name="accept")
def day_accept(
    day: Annotated[str, typer.Argument(metavar="DATE", help="A day in quarantine.")],
    config: ConfigFile,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Let the next window train on a day in quarantine."""
    from des_core.recurring import daily

    daily.accept(_load(config, set_), daily.parse_day(day, "the day"))
    _line("accepted", f"{day}: the next run's window takes it in")
    _answer(as_json, {"accepted": day})


@app.command(name="compile")
def compile_(
    config: ConfigFile,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The YAML to write.")],
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write the pipeline for Kubeflow as YAML."""
    from pipelines.training import compile_to

    loaded = _load(config, set_)
    compile_to(loaded, str(output))
    _line("pipeline", str(output))
    _answer(as_json, {"pipeline": str(output), "config_digest": loaded.digest})


@app.command()
def submit(
    config: ConfigFile,
    as_of: Day = None,
    host: Host = None,
    namespace: Namespace = None,
    experiment: Experiment = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline on Kubeflow, once."""
    from des_core.recurring import daily

    # A pod knows better which day yesterday was, when it comes to run.
    day = "yesterday" if as_of == "yesterday" else daily.parse_day(as_of, "--as-of") if as_of else ""
    loaded = _load_for_pods(config, set_)
    with scratch.folder("submit") as folder:
        kubeflow, version, found = _upload(loaded, folder, host, namespace, experiment)
        run_id = kubeflow.run(loaded.run.name, version, found, day)
    page = kubeflow.ui("runs", run_id)
    _line("version", version.name + ("" if version.uploaded else " (was there)"))
    _line("run", run_id)
    _line("page", page)
    _answer(as_json, {"run_id": run_id, "experiment_id": found, "page": page, **_version_facts(version)})


@app.command()
def schedule(
    config: Annotated[Path | None, typer.Option("-c", "--config", metavar="FILE", help="The run's TOML.")] = None,
    cron: Annotated[
        str | None,
        typer.Option(metavar="LINE", help='Six fields, seconds first, in Kubeflow time, like "0 0 3 * * *".'),
    ] = None,
    interval: Annotated[str | None, typer.Option(metavar="TIME", help="Like 24h.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the schedules there are.")] = False,
    pause: Annotated[str | None, typer.Option(metavar="NAME", help="Put a schedule to sleep.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Wake it.")] = None,
    delete: Annotated[str | None, typer.Option(metavar="NAME", help="Delete it; its runs stay.")] = None,
    host: Host = None,
    namespace: Namespace = None,
    experiment: Experiment = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline on Kubeflow every day, as of yesterday."""
    from pipelines import client, trigger

    asked = [pause, resume, delete, config]
    if list_ + sum(word is not None for word in asked) != 1:
        raise UserError("give one of -c FILE (with --cron or --interval), --list, --pause, --resume and --delete NAME")
    if config is None:
        if cron or interval or set_ or experiment:
            raise UserError("--cron, --interval, --set and --experiment go with -c FILE")
        kubeflow = client.connect(host, namespace)
        for verb, done, name in (
            ("disable", "paused", pause),
            ("enable", "resumed", resume),
            ("delete", "deleted", delete),
        ):
            if name is not None:
                kubeflow.change(verb, name)
                _line(done, name)
                _answer(as_json, {"schedule": name, "done": done})
        if list_:
            found = kubeflow.schedules()
            for one in found:
                _line(one.name, f"{'enabled' if one.enabled else 'paused'}; {one.about}")
            _answer(as_json, {"schedules": [one._asdict() for one in found]})
        return
    if (cron is None) == (interval is None):
        raise UserError('give one of --cron "0 0 3 * * *" and --interval 24h')
    when = trigger.from_cron(cron) if cron is not None else trigger.from_interval(str(interval))
    loaded = _load_for_pods(config, set_)
    with scratch.folder("schedule") as folder:
        kubeflow, version, at = _upload(loaded, folder, host, namespace, experiment)
        made, done = kubeflow.schedule(loaded.run.name, version, at, "yesterday", when)
    page = kubeflow.ui("recurringrun", made.id)
    _line("version", version.name + ("" if version.uploaded else " (was there)"))
    _line("schedule", f"{done}: {made.name}, {when}")
    _line("page", page)
    facts = {"schedule": made.name, "schedule_id": made.id, "done": done, "when": str(when), "page": page}
    _answer(as_json, facts | {"experiment_id": at} | _version_facts(version))


@app.command()
def ingest(
    config: ConfigFile,
    day: Annotated[str | None, typer.Option(metavar="DATE", help="Only this day of a path with {day}.")] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Raw logs -> feature store."""
    from components import stages

    done = stages.ingest(_load(config, set_), day)
    _tell("ingest", done, as_json)


@app.command()
def train(
    config: ConfigFile,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show where a step's time goes.")] = False,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Feature store -> weights, on local workers."""
    from components import stages
    from des_core.run import pin

    run = pin(_load(config, set_))
    done = stages.train(run, resume, profile)
    if profile:
        from des_core.release.report import profile as pages
        from pipelines import summary

        phases, page = pages.write(run)
        summary.show_profile(phases)
        done.numbers["profile"] = page
        _line("profile", page)
    _tell("train", done, as_json)


@app.command()
def evaluate(config: ConfigFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Weights -> report and predictions of the test rows."""
    from components import stages
    from des_core.run import pin

    done = stages.evaluate(pin(_load(config, set_)))
    _tell("evaluate", done, as_json)


@app.command()
def register(config: ConfigFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Judge the model, then register a version of it."""
    from components import stages
    from des_core.run import pin
    from pipelines import summary

    loaded = _load(config, set_)
    pinned = pin(loaded)
    judged = stages.gate(pinned)
    _line("gate", judged.what)
    done = stages.register(pinned)
    result = summary.of_run(pinned, unchanged=done.unchanged)
    summary.tell(result)
    _answer(as_json, result)


@app.command()
def predict(
    model: Annotated[str, typer.Option("--model", metavar="URI", help="models:/NAME@champion or models:/NAME/3.")],
    input_: Annotated[str, typer.Option("--input", metavar="FILE", help="Raw records, in the logs' format.")],
    output: Annotated[str, typer.Option("--output", metavar="FILE", help="CSV of sample,probability to write.")],
    keep: Annotated[str, typer.Option(metavar="COLUMNS", help="Columns to carry through, like user_id,time.")] = "",
    config: Annotated[
        Path | None, typer.Option("-c", "--config", metavar="FILE", help="TOML with the registry and the source.")
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score raw records with a registered model."""
    from des_core.release.registry import registry
    from des_core.release.serve import prediction

    if set_ and config is None:
        raise UserError("--set changes a config: give one with -c FILE")
    loaded = None if config is None else _load(config, set_)
    uri = prediction.tracking_uri(model, loaded)
    with scratch.folder("model") as folder:
        found = registry.fetch(model, uri, folder)
        scored = prediction.predict(found.folder, input_, output, loaded, tuple(filter(None, keep.split(","))))
    _line("predict", f"{scored.rows:,} rows scored by {found.name} version {found.version}")
    if scored.bad:
        _line("left out", f"{scored.bad:,} bad rows, the first at {scored.first_reason}")
    _line("scores", output)
    numbers = {"rows": scored.rows, "bad_rows": scored.bad, "output": output}
    _answer(as_json, {"model": found.name, "version": int(found.version), **numbers})


@app.command()
def serve(
    model: Annotated[str, typer.Option("--model", metavar="URI", help="models:/NAME@champion or models:/NAME/VERSION")],
    config: Annotated[Path | None, typer.Option("-c", "--config", metavar="FILE", help="Names the registry.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any.")] = 8080,
    poll_s: Annotated[float, typer.Option(min=0.05, help="Seconds between looks at the alias.")] = 10.0,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest request, MiB.")] = 16,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Answer over HTTP with a registered model, and follow its alias."""
    from components.launch import environment

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Requests are what runs side by side, not pieces of one.
    for name in environment.THREADS:
        os.environ.setdefault(name, "1")
    from des_core.release.serve import prediction, server

    if set_ and config is None:
        raise UserError("--set changes a config: give one with -c FILE")
    uri = prediction.tracking_uri(model, None if config is None else _load(config, set_))
    replica = server.Replica(model, uri, poll_s)
    server.serve(replica, host, port, environment.cpu_quota(), max_body_mb << 20)
    _answer(as_json, {"model": model, "requests": replica.monitor.requests.total()})


@app.command()
def lineage(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    config: Annotated[Path | None, typer.Option("-c", "--config", metavar="FILE", help="Names the registry.")] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Versions that led to a model, back to the first."""
    from des_core.release.registry import registry
    from des_core.release.serve import prediction
    from pipelines import summary

    if set_ and config is None:
        raise UserError("--set changes a config: give one with -c FILE")
    uri = prediction.tracking_uri(model, None if config is None else _load(config, set_))
    links = registry.chain(model, uri)
    summary.show_chain(links)
    _answer(as_json, {"model": model, "chain": [link.model_dump(mode="json") for link in links]})


@app.command()
def plan(
    config: ConfigFile,
    workers: Annotated[int | None, typer.Option(min=1, help="Default: train.workers.")] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Bytes per exchange, and who owns which fields. Ingests what is not ingested yet."""
    from components import stages
    from des_core.contracts import Dataset, Reference
    from des_core.engine.exchange.plan import plan_summary
    from pipelines import summary

    loaded = _load(config, set_)
    reference = Reference.parse(stages.ingest(loaded).reference)
    dataset = Dataset.load(reference)
    explained = plan_summary(loaded, dataset, reference, workers or loaded.train.workers)
    summary.show_plan(explained)
    _answer(as_json, explained)


@app.command()
def generate(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for {day}.csv and truth/.")],
    days: Annotated[int, typer.Option(min=1, max=366, help="Days from 2026-01-01.")] = 3,
    rows_per_day: Annotated[int, typer.Option(min=1, help="Rows of each day.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same logs.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Synthetic raw click logs."""
    from des_core.data.read import synthetic

    files = synthetic.generate(str(out), days, rows_per_day, seed)
    _line("logs", f"{len(files)} days of {rows_per_day:,} rows in {out}")
    _answer(as_json, {"out": str(out), "files": files, "days": days, "rows_per_day": rows_per_day, "seed": seed})


COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one command, one exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        # A locale without a letter shows its escape.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_run(words or ["--help"]))


def _run(words: list[str]) -> int:
    as_json = "--json" in words
    try:
        with told_to_end():
            code = app(words, prog_name="des", standalone_mode=False)
        sys.stdout.flush()
        return _fail(as_json, _interrupted(words), 130) if code == 130 else int(code or 0)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(as_json, _interrupted(words), 130)
    except SystemExit as error:
        if error.code != 128 + signal.SIGTERM:
            raise
        return _fail(as_json, _interrupted(words), 128 + signal.SIGTERM)
    except typer.TyperException as error:
        command = words[0] if words[0] in COMMANDS else ""
        return _fail(
            as_json,
            f"{error.format_message().rstrip('.')}; see: {' '.join(filter(None, ['des', command, '--help']))}",
            2,
        )
    except DesError as error:
        return _fail(as_json, str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of our output, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        known = of_system(error) if isinstance(error, OSError) else None
        if known is not None:
            return _fail(as_json, str(known), known.exit_code)
        return _fail(as_json, _crash(error), 1)


def _interrupted(words: list[str]) -> str:
    """What is said of a command that a signal ended."""
    how = {
        "run": "; the same command goes on from what is done",
        "train": "; des train --resume goes on from the last checkpoint, if there is one",
    }
    return "interrupted" + how.get(words[0], "")


def _fail(as_json: bool, message: str, code: int) -> int:
    line = hidden(" ".join(message.split()))
    print(f"error: {line}", file=sys.stderr, flush=True)
    _answer(as_json, {"error": line, "code": code})
    return code


def _crash(error: Exception) -> str:
    """One line for an error that nobody foresaw; the traceback goes to a file."""
    folder = crash_folder if os.path.isdir(crash_folder) else tempfile.gettempdir()
    path = os.path.join(folder, "crash.log")
    told = f"unexpected {type(error).__name__}: {str(error)[:300]}"
    try:
        Path(path).write_text(hidden(traceback.format_exc()), encoding="utf-8")
    except OSError as second:
        return f"{told}; its traceback could not be written ({second.strerror})"
    return f"{told}; the full traceback is in {path}"


def _load(path: Path, overrides: list[str] | None) -> Config:
    global crash_folder
    from des_core.config import load_config

    config = load_config(path, tuple(overrides or ()))
    remember(config.notify.webhook)
    crash_folder = config.run.dir
    return config


def _load_for_pods(path: Path, overrides: list[str] | None) -> Config:
    """The config as the steps' pods see it, if they can reach all that it names."""
    from des_core.config import load_config
    from pipelines import settings

    return settings.as_seen(load_config(path, tuple(overrides or ()), in_pods=True))


def _upload(
    config: Config, folder: str, host: str | None, namespace: str | None, experiment: str | None
) -> tuple[Kubeflow, Version, str]:
    """Kubeflow, the version of the pipeline there, and the experiment's id."""
    from pipelines import client
    from pipelines.training import compile_to

    kubeflow = client.connect(host, namespace)
    package = os.path.join(folder, f"{config.run.name}.yaml")
    compile_to(config, package)
    return kubeflow, kubeflow.upload(config, package), kubeflow.experiment(experiment or config.run.name)


def _version_facts(version: Version) -> dict[str, Any]:
    facts = version._asdict()
    return {"version": facts.pop("name"), **facts}


def _tell(name: str, done: Done, as_json: bool) -> None:
    _line(name, ("unchanged: " if done.unchanged else "") + done.what)
    if done.page:
        _line("report", done.page)
    page = {"report": done.page} if done.page else {}
    facts = {"command": name, "unchanged": done.unchanged, "reference": done.reference}
    _answer(as_json, facts | page | done.numbers)


def _line(key: str, text: str) -> None:
    """One fact: aligned on a terminal, key=value elsewhere."""
    print(f"{key:<9} {text}" if sys.stdout.isatty() else f"{key}={shlex.quote(text)}", flush=True)


def _answer(as_json: bool, result: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(result, sort_keys=True), flush=True)


if __name__ == "__main__":
    main()
