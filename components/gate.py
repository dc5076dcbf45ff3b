"""Candidate against champion -> a verdict with reasons."""

from kfp.dsl import HTML, Output

from components._step import step


@step
def gate(config: str, inputs: str, report: str, run_id: str, page: Output[HTML]) -> str:
    """Reference of gate.json."""
    from components import _runtime, _stages

    done = _runtime.on_run("gate", _stages.gate, config, run_id, inputs, report)
    _runtime.copy_page(done.page, page.path)
    return done.reference
