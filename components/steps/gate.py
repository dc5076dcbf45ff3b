"""Candidate against champion -> a verdict with reasons."""

from kfp.dsl import HTML, Output

from components.step import step


@step
def gate(config: str, inputs: str, report: str, run_id: str, page: Output[HTML]) -> str:
    """Reference of gate.json."""
    from components import stages, step_runtime

    done = step_runtime.on_run("gate", stages.gate, config, run_id, inputs, report)
    step_runtime.copy_page(done.page, page.path)
    return done.reference
