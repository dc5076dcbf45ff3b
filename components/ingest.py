"""Raw logs -> feature store."""

from components._step import step


@step
def ingest(config: str) -> str:
    """Reference of the data manifest."""
    from components import _runtime, _stages

    return _runtime.on_config("ingest", _stages.ingest, config).reference
