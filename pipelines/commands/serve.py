"""``des serve``: a model over HTTP."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from pipelines.commands.options import AsJson, Model, Overrides, RegistryConfig, load_registry
from pipelines.commands.output import answer


def serve(
    model: Model,
    config: RegistryConfig = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any.")] = 8080,
    poll_s: Annotated[float, typer.Option(min=0.05, help="Seconds between looks at the alias.")] = 2.0,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest request, MiB.")] = 16,
    memory: Annotated[
        int, typer.Option(min=0, help="Most of the weights' files to hold in memory, MB; 0: as the system decides.")
    ] = 0,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Serve a registered model over HTTP, and follow its alias."""
    from components.launch import environment
    from des_core.cpus import cpu_quota

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Requests are what runs side by side, not pieces of one.
    for name in environment.THREADS:
        os.environ.setdefault(name, "1")
    from des_core.release.serve import server

    loaded, uri = load_registry(model, config, set_)
    root = "" if loaded is None else loaded.storage.root
    replica = server.Replica(model, uri, poll_s, root, memory * 1_000_000)
    server.serve(replica, host, port, cpu_quota(), max_body_mb << 20)
    answer(as_json, {"model": model, "requests": replica.monitor.requests.total()})
