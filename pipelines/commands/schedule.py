"""``des schedule``: recurring runs of the pipeline on Kubeflow."""

from __future__ import annotations

from typing import Annotated

import typer

from des_core.errors import UserError
from pipelines.commands.options import AsJson, ConfigFile, Experiment, Host, Namespace, Overrides
from pipelines.commands.output import answer, show
from pipelines.commands.uploading import load_for_pods, show_version, upload, version_facts

app = typer.Typer(help="Run the pipeline on Kubeflow every day, as of yesterday.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The schedule's name, as des schedule list shows it.")]


@app.command()
def create(
    config: ConfigFile,
    cron: Annotated[
        str | None,
        typer.Option(metavar="LINE", help='Six fields, seconds first, in Kubeflow time, like "0 0 3 * * *".'),
    ] = None,
    interval: Annotated[str | None, typer.Option(metavar="TIME", help="Time between runs, like 24h.")] = None,
    host: Host = None,
    namespace: Namespace = None,
    experiment: Experiment = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Create the schedule of a config, or replace the one there is."""
    from pipelines import trigger

    if (cron is None) == (interval is None):
        raise UserError('give one of --cron "0 0 3 * * *" and --interval 24h')
    when = trigger.from_cron(cron) if cron is not None else trigger.from_interval(str(interval))
    loaded = load_for_pods(config, set_)
    kubeflow, version, experiment_id = upload(loaded, host, namespace, experiment)
    made, done = kubeflow.schedule(loaded.run.name, version, experiment_id, "yesterday", when)
    page = kubeflow.ui("recurringrun", made.id)
    show_version(version)
    show("schedule", f"{done}: {made.name}, {when}")
    show("page", page)
    facts = {"schedule": made.name, "schedule_id": made.id, "done": done, "when": str(when), "page": page}
    answer(as_json, facts | {"experiment_id": experiment_id} | version_facts(version))


@app.command(name="list")
def list_schedules(host: Host = None, namespace: Namespace = None, as_json: AsJson = False) -> None:
    """List the schedules."""
    from pipelines import client

    found = client.connect(host, namespace).schedules()
    for one in found:
        show(one.name, f"{'enabled' if one.enabled else 'paused'}; {one.about}")
    answer(as_json, {"schedules": [one._asdict() for one in found]})


@app.command()
def pause(name: Name, host: Host = None, namespace: Namespace = None, as_json: AsJson = False) -> None:
    """Start no more runs until the schedule is resumed."""
    _change("disable", "paused", name, host, namespace, as_json)


@app.command()
def resume(name: Name, host: Host = None, namespace: Namespace = None, as_json: AsJson = False) -> None:
    """Start runs again after a pause."""
    _change("enable", "resumed", name, host, namespace, as_json)


@app.command()
def delete(name: Name, host: Host = None, namespace: Namespace = None, as_json: AsJson = False) -> None:
    """Delete the schedule; its runs stay."""
    _change("delete", "deleted", name, host, namespace, as_json)


def _change(verb: str, done: str, name: str, host: str | None, namespace: str | None, as_json: bool) -> None:
    from pipelines import client

    client.connect(host, namespace).change(verb, name)
    show(done, name)
    answer(as_json, {"schedule": name, "done": done})
