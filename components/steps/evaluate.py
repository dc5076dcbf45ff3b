"""Weights -> metrics of valid and test, and the champion's scores of the same rows."""

from kfp.dsl import HTML, Metrics, Output

from components.step import step


@step
def evaluate(config: str, inputs: str, training: str, run_id: str, metrics: Output[Metrics], page: Output[HTML]) -> str:
    """Reference of report.json."""
    from components import stages, step_runtime

    done = step_runtime.on_run("evaluate", stages.evaluate, config, run_id, inputs, training)
    step_runtime.copy_page(done.page, page.path)
    for name, value in done.numbers.items():
        metrics.log_metric(name, value)
    return done.reference
