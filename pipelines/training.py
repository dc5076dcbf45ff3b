"""The DAG, written once for laptop and cluster: resolve -> ingest -> train -> evaluate -> gate -> register.

Steps pass strings: the resolved config and references to manifests. KFP's cache is off in every task, because its key
knows neither our code nor the logs; our own manifests say what is done.
"""

import os
from pathlib import Path

from kfp import compiler, dsl

from components.evaluate import evaluate
from components.gate import gate
from components.ingest import ingest
from components.register import register
from components.resolve import resolve
from components.train import train
from des_core.config import Config
from des_core.errors import UserError


@dsl.pipeline(name="des-training", description="Raw logs to a judged and registered click model.")
def training(config: str, as_of: str = ""):  # type: ignore[no-untyped-def]  # noqa: ANN201  KFP warns of None
    """One run, whole."""
    resolved = resolve(config=config, as_of=as_of).set_caching_options(False)
    data = ingest(config=resolved.output).set_caching_options(False)
    trained = train(config=resolved.output, dataset=data.output).set_caching_options(False)
    scored = evaluate(config=resolved.output, dataset=data.output, training=trained.output).set_caching_options(False)
    report = scored.outputs["Output"]
    judged = gate(config=resolved.output, dataset=data.output, report=report).set_caching_options(False)
    verdict = judged.outputs["Output"]
    register(config=resolved.output, dataset=data.output, verdict=verdict).set_caching_options(False)


def compile_to(config: Config, output: str) -> None:
    """Write the DAG as YAML, with the config as the default of its one parameter; the same bytes every time.

    Raises:
        UserError: there is no such folder, or a password in the config.
    """
    from pipelines import settings

    settings.check_secrets(config)
    if not Path(output).absolute().parent.is_dir():
        raise UserError(f"{Path(output).parent}: no such folder for {Path(output).name}; make it first")
    partial = f"{output}.partial-{os.getpid()}.yaml"
    try:
        parameters = {"config": config.model_dump_json()}
        compiler.Compiler().compile(settings.settled(training, config), partial, pipeline_parameters=parameters)
        os.replace(partial, output)
    finally:
        Path(partial).unlink(missing_ok=True)
