"""First step: everything that can be checked before work begins, and which day it is about."""

from components.step import step


@step
def resolve(config: str, as_of: str, run_id: str) -> str:
    """The day, or "all" for whole logs, or "absent": the DAG's only condition."""
    from functools import partial

    from components import stages, step_runtime

    return step_runtime.on_config("resolve", partial(stages.resolve, as_of=as_of), config, run_id).reference
