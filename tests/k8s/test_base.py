"""The base is what a cluster accepts, to the last key."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

BASE = Path(__file__).parents[2] / "k8s" / "base"
KUBERNETES = "1.34"


def check(resource: dict[str, Any]) -> None:
    """Raises for an unknown key, a missing one or a value of another kind."""
    kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def test_every_object_is_listed_and_valid() -> None:
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    assert sorted(listed) == sorted(file.name for file in BASE.glob("*.yaml") if file.name != "kustomization.yaml")
    for name in listed:
        for resource in yaml.safe_load_all((BASE / name).read_text(encoding="utf-8")):
            check(resource)
            with pytest.raises(kubernetes_validate.ValidationError):
                check(resource | {"specs": {}})


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_what_kustomize_renders_is_valid_and_labelled() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(BASE)], capture_output=True, text=True, check=True)
    resources = list(yaml.safe_load_all(done.stdout))
    assert sorted(resource["kind"] for resource in resources) == ["Namespace", "PersistentVolumeClaim"]
    for resource in resources:
        check(resource)
        assert resource["metadata"]["labels"]["app.kubernetes.io/part-of"] == "des"
        assert resource["metadata"].get("namespace", resource["metadata"]["name"]) == "des"
