"""Feature store -> weights, on N workers."""

from components._step import step


@step
def train(config: str, inputs: str, scored: str, run_id: str) -> str:
    """Reference of training.json."""
    from components import _runtime, _stages

    return _runtime.on_run("train", _stages.train, config, run_id, inputs, scored).reference
