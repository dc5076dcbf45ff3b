"""A judged model -> a version in the registry, with its aliases."""

from components.step import step


@step
def register(config: str, inputs: str, verdict: str, run_id: str) -> str:
    """Reference of version.json."""
    from components import stages, step_runtime

    return step_runtime.on_run("register", stages.register, config, run_id, inputs, verdict).reference
