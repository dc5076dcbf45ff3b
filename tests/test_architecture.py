"""The import rules, held by reading every import in the tree, lazy ones too."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    str(path.relative_to(ROOT))
    for top in ("des_core", "components", "pipelines", "k8s")
    for path in (ROOT / top).rglob("*.py")
)
ONLY = {
    "torch": ("des_core/engine/", "des_core/release/serve/serving.py"),
    "torch.distributed": ("des_core/engine/exchange/collectives.py",),
    "mlflow": ("des_core/release/registry/",),
    "kubernetes": ("k8s/api.py",),
    "ray": ("des_core/data/store/engine_ray.py",),
    "kfp": ("components/", "pipelines/"),
    "kfp_server_api": ("pipelines/client.py",),
    "pipelines": ("pipelines/",),
    "components": ("components/", "pipelines/"),
    "k8s": ("k8s/", "components/"),
}
"""Module: the only places that may import it."""

NEVER = {
    "des_core/data/": ("des_core.engine", "des_core.release", "des_core.recurring"),
    "des_core/data/read/": ("des_core.data.store", "des_core.data.feed"),
    "des_core/data/store/": ("des_core.data.feed",),
    "des_core/checkpoint/": ("des_core.engine", "des_core.release", "des_core.recurring"),
    "des_core/engine/": ("des_core.release", "des_core.recurring"),
    "des_core/release/": ("des_core.recurring",),
    "des_core/release/registry/": ("des_core.release.judge", "des_core.release.report", "des_core.release.serve"),
    "components/launch/local.py": ("components.launch.cluster",),
    "components/launch/cluster.py": ("components.launch.local",),
    "k8s/": ("des_core.engine",),
}
"""Place: modules it must not import. Of release, serving.py alone imports the engine: see below."""


def imports(file: str) -> set[str]:
    """Every module that a file names in an import, with what it takes from it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file: str) -> None:
    never = [module for place, modules in NEVER.items() if file.startswith(place) for module in modules]
    never += [module for module, places in ONLY.items() if not file.startswith(places)]
    if file.startswith(("des_core/release/", "des_core/recurring/")) and not file.endswith("/serving.py"):
        never.append("des_core.engine")
    broken = sorted(name for name in imports(file) for module in never if within(name, module))
    assert not broken, f"{file} must not import {broken}"


LEAVES = sorted(
    str(path.relative_to(ROOT))
    for path in [*(ROOT / "des_core").glob("*.py"), *(ROOT / "des_core/config").glob("*.py")]
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_only_leaves(leaf: str) -> None:
    """What every room may import imports no room."""
    rooms = {path.name for path in (ROOT / "des_core").iterdir() if path.is_dir()} - {"config"}
    ours = {name.split(".")[1] for name in imports(leaf) if name.startswith("des_core.")}
    assert not ours & rooms


@pytest.mark.parametrize("file", FILES)
def test_no_error_is_swallowed(file: str) -> None:
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            assert not (broad and isinstance(node.body[0], ast.Pass | ast.Continue)), f"{file}:{node.lineno}"


def test_help_is_quick() -> None:
    """In seconds of CPU, which other tests running beside this one do not change."""
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "--help"]
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        after = os.times()
        seconds.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert min(seconds) < 0.5, f"des --help took {min(seconds):.2f} s; import heavy modules inside the command"
