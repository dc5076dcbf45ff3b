"""A judged model -> a version in the registry, with its aliases."""

from components._step import step


@step
def register(config: str, inputs: str, verdict: str, run_id: str) -> str:
    """Reference of version.json."""
    from components import _runtime, _stages

    return _runtime.on_run("register", _stages.register, config, run_id, inputs, verdict).reference
