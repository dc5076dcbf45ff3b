"""First step: everything that can be checked before work begins."""

from components._step import step


@step
def resolve(config: str, as_of: str = "") -> str:
    """The resolved config, once logs and registry are known to be there."""
    from functools import partial

    from components import _runtime, _stages

    return _runtime.on_config("resolve", partial(_stages.resolve, as_of=as_of), config).reference
