"""Feature store -> weights, on N workers."""

from components.step import step


@step
def train(config: str, inputs: str, scored: str, run_id: str) -> str:
    """Reference of training.json."""
    from components import stages, step_runtime

    return step_runtime.on_run("train", stages.train, config, run_id, inputs, scored).reference
