"""``des submit``: one run of the pipeline on Kubeflow."""

from __future__ import annotations

from pipelines.commands.options import AsJson, ConfigFile, Day, Experiment, Host, Namespace, Overrides
from pipelines.commands.output import answer, show
from pipelines.commands.uploading import load_for_pods, show_version, upload, version_facts


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
    loaded = load_for_pods(config, set_)
    kubeflow, version, found = upload(loaded, host, namespace, experiment)
    run_id = kubeflow.run(loaded.run.name, version, found, day)
    page = kubeflow.ui("runs", run_id)
    show_version(version)
    show("run", run_id)
    show("page", page)
    answer(as_json, {"run_id": run_id, "experiment_id": found, "page": page, **version_facts(version)})
