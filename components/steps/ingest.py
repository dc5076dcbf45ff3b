"""Raw logs -> feature store, and what the run is pinned to."""

from components.step import step


@step
def ingest(config: str, as_of: str, run_id: str) -> str:
    """Reference of inputs.json."""
    from functools import partial

    from components import stages, step_runtime

    return step_runtime.on_config("ingest", partial(stages.ingest_and_pin, as_of=as_of), config, run_id).reference
