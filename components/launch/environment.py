"""CPUs, threads and import paths of the processes that a launcher starts."""

from __future__ import annotations

import os
from pathlib import Path

from des_core.config import Config
from des_core.cpus import cpu_quota
from des_core.errors import ConfigError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def worker_environment(workers: int) -> dict[str, str]:
    """The environment of local workers: each has its share of the CPUs, and imports our packages from our place."""
    environment = dict(os.environ)
    for name in THREADS:
        # One CPU of a share of several is for the thread that prepares the next batch.
        environment.setdefault(name, str(max(1, cpu_quota() // workers - 1)))
    return environment | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": import_path()}


def image_of(config: Config, default: str = "") -> str:
    """The image of steps and workers: cluster.image, else DES_IMAGE, else ``default``.

    Raises:
        ConfigError: there is none, or its tag names no version, and steps and workers could be different ones.
    """
    image = config.cluster.image or os.environ.get("DES_IMAGE") or default
    if not image:
        raise ConfigError("cluster.image is not set, nor DES_IMAGE; name the image, like ghcr.io/des/des-python:0.1.0")
    tag = image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        raise ConfigError(f"cluster.image = {image!r} names no version; give it a tag other than latest, or a digest")
    return image


def import_path() -> str:
    """A PYTHONPATH under which a child finds the packages that this process runs."""
    home = Path(__file__).resolve().parent.parent.parent
    # Installed packages are found anyway, and must not come before the standard library.
    first = [] if home.name in ("site-packages", "dist-packages") else [str(home)]
    return os.pathsep.join([*first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
