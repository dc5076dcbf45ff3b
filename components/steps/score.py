"""The champion scores the new rows before anything is trained on them."""

from components.step import step


@step
def score(config: str, inputs: str, run_id: str) -> str:
    """Reference of new_rows.json, or of inputs.json for a run over whole logs."""
    from components import stages, step_runtime

    return step_runtime.on_run("score", stages.score, config, run_id, inputs).reference
