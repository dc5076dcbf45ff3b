"""The decorator of every step: our image, and nothing installed when it runs.

A step is a KFP component whose body only imports our packages, which are in the image, and calls one stage. Steps pass
strings: the resolved config as JSON, and references to manifests. Data never travels as KFP artifacts.
"""

from functools import partial

from kfp import dsl

from des_core import __version__

IMAGE = f"ghcr.io/des/des-python:{__version__}"
"""The image of this version; a compiled pipeline may name another (``pipelines/settings.py``)."""

step = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
"""Decorator of a step."""
