"""The pipeline as a DAG of steps: one definition, for local runs and for Kubeflow.

    resolve -> ingest -> score -> train -> evaluate -> gate -> register       not where the day's logs are absent
    notify                                                                    in any case, also after a failure

Steps pass strings: the resolved config and references to manifests. KFP's cache is off in every task, because its key
contains neither our code nor the logs; our own manifests record what is done.
"""

import os
from pathlib import Path

from kfp import compiler, dsl

from components.stages import ABSENT
from components.steps.evaluate import evaluate
from components.steps.gate import gate
from components.steps.ingest import ingest
from components.steps.notify import notify
from components.steps.register import register
from components.steps.resolve import resolve
from components.steps.score import score
from components.steps.train import train
from des_core.config import Config
from des_core.errors import UserError


def _uncached(task: dsl.PipelineTask) -> dsl.PipelineTask:
    return task.set_caching_options(False)


@dsl.pipeline(name="des-training", description="Raw logs to a judged and registered click model.")
def training(config: str, as_of: str = ""):  # type: ignore[no-untyped-def]  # noqa: ANN201  KFP warns of None
    """One run of all steps: over a day's window where as_of is a date or "yesterday", else over whole logs."""
    given = {"config": config, "run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    with dsl.ExitHandler(_uncached(notify(**given))):
        resolved = _uncached(resolve(as_of=as_of, **given))
        with dsl.If(resolved.output != ABSENT):
            pinned = _uncached(ingest(as_of=resolved.output, **given))
            given |= {"inputs": pinned.output}
            scored = _uncached(score(**given))
            trained = _uncached(train(scored=scored.output, **given))
            judged = _uncached(evaluate(training=trained.output, **given))
            verdict = _uncached(gate(report=judged.outputs["Output"], **given))
            _uncached(register(verdict=verdict.outputs["Output"], **given))


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
