"""The last step, which always runs: posts the outcome to a webhook and releases the lease."""

from kfp.dsl import PipelineTaskFinalStatus

from components.step import step


@step
def notify(config: str, run_id: str, status: PipelineTaskFinalStatus):  # type: ignore[no-untyped-def]  # noqa: ANN201  KFP warns of None
    """Post the outcome."""
    from components import step_runtime

    step_runtime.end(config, run_id, status.state, status.error_message)
