"""What the compiled pipeline asks of a cluster: every step's pod is settled, whatever the DAG is."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from des_core.errors import ConfigError
from pipelines import settings
from pipelines.training import compile_to
from tests.finished import config_of

GOLDEN = Path(__file__).parent / "training.yaml"

CLUSTER = (
    "storage.root=/data/shop",
    "registry.tracking_uri=http://mlflow:5000",
    "source.path=/data/logs/{day}.csv",
    "cluster.image=registry:5000/des-python:7",
    "cluster.cpu=1500m",
    "cluster.memory=6Gi",
    "cluster.gpus=2",
    "recurring.wait_hours=2.5",
)


def compiled(folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline's document, and that of its cluster settings."""
    compile_to(config_of(folder, *CLUSTER, *overrides), str(folder / "pipeline.yaml"))
    pipeline, platform = yaml.load_all((folder / "pipeline.yaml").read_text(), yaml.CSafeLoader)
    return pipeline, platform


def pods_of(platform: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by executor."""
    found: dict[str, dict[str, Any]] = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return found


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DES_IMAGE", raising=False)
        return compiled(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def pipeline(documents: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return documents[0]


@pytest.fixture
def pods(documents: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return pods_of(documents[1])


def tasks(pipeline: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every task, also those inside conditions and exit handlers, with its name."""
    graphs = [pipeline["root"], *(part for part in pipeline["components"].values() if "dag" in part)]
    for graph in graphs:
        yield from graph["dag"]["tasks"].items()


def steps(pipeline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tasks that are pods, by the executor's name without its prefix."""
    components = pipeline["components"]
    return {
        components[task["componentRef"]["name"]]["executorLabel"].removeprefix("exec-"): task
        for _, task in tasks(pipeline)
        if "executorLabel" in components[task["componentRef"]["name"]]
    }


def test_every_step_is_settled(pipeline: dict[str, Any], pods: dict[str, Any]) -> None:
    executors = pipeline["deploymentSpec"]["executors"]
    assert set(pods) == set(executors) == {f"exec-{name}" for name in steps(pipeline)}
    for name, pod in pods.items():
        container = executors[name]["container"]
        assert container["image"] == "registry:5000/des-python:7"
        assert container["env"] == [{"name": "DES_IMAGE", "value": "registry:5000/des-python:7"}]
        assert pod["imagePullPolicy"] == "IfNotPresent"
        assert pod["securityContext"] == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
        assert pod["podMetadata"]["labels"] == {
            "app.kubernetes.io/part-of": "des",
            "app.kubernetes.io/component": "step",
        }
        assert pod["podMetadata"]["annotations"] == {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
        assert {item["name"]: item["fieldPath"] for item in pod["fieldPathAsEnv"]} == settings.OWN_POD
        assert [(mount["constant"], mount["mountPath"]) for mount in pod["pvcMount"]] == [("des-storage", "/data")]
        assert {item["secretName"] for item in pod["secretAsEnv"]} == set(settings.SECRETS)
        assert all(item["optional"] for item in pod["secretAsEnv"])
        size = container["resources"]
        assert size["resourceCpuLimit"] == size["resourceCpuRequest"]
        assert size["resourceMemoryLimit"] == size["resourceMemoryRequest"]
        assert int(pod["activeDeadlineSeconds"]) >= settings.SPARE_S


def test_no_task_is_cached_and_only_training_is_tried_again(pipeline: dict[str, Any]) -> None:
    # A task inside a condition or an exit handler counts as much; KFP's own groups have no such option.
    found = steps(pipeline)
    assert all(not task["cachingOptions"].get("enableCache") for _, task in tasks(pipeline) if "cachingOptions" in task)
    assert all(task["cachingOptions"] == {} for task in found.values())
    assert "enableCache" not in str(pipeline)
    assert {name for name, task in found.items() if "retryPolicy" in task} == {"train"}
    assert found["train"]["retryPolicy"]["maxRetryCount"] == 2


def test_data_never_travel_as_artifacts(pipeline: dict[str, Any]) -> None:
    for component in pipeline["components"].values():
        assert "artifacts" not in component.get("inputDefinitions", {})
        for artifact in component.get("outputDefinitions", {}).get("artifacts", {}).values():
            assert artifact["artifactType"]["schemaTitle"] in ("system.HTML", "system.Markdown", "system.Metrics")
    sources = [path.read_text() for path in (Path(__file__).parents[2] / "components").rglob("*.py")]
    assert not any(re.search(r"(Input|Output)\[(dsl\.)?(Dataset|Model|Artifact)\]", source) for source in sources)


def test_steps_that_handle_data_are_as_large_as_the_config_says(
    pipeline: dict[str, Any], pods: dict[str, Any], tmp_path: Path
) -> None:
    sizes = {
        name.removeprefix("exec-"): executor["container"]["resources"]
        for name, executor in pipeline["deploymentSpec"]["executors"].items()
    }
    for name, size in sizes.items():
        small = name in ("resolve", "notify")
        cpu, memory = settings.SMALL if small else ("1500m", "6Gi")
        assert (size["resourceCpuLimit"], size["resourceMemoryLimit"]) == (cpu, memory)
    assert {name for name, size in sizes.items() if "accelerator" in size} == set(sizes) & set(settings.ON_GPU)
    assert sizes["train"]["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert sizes["train"]["accelerator"]["resourceCount"] == "2"
    assert int(pods["exec-resolve"]["activeDeadlineSeconds"]) == 9000 + settings.SPARE_S

    away, waits = compiled(tmp_path, "cluster.backend=pytorchjob", "cluster.nodes=2", "cluster.deadline_s=100")
    train = away["deploymentSpec"]["executors"]["exec-train"]["container"]["resources"]
    assert (train["resourceCpuLimit"], train["resourceMemoryLimit"]) == settings.SMALL
    assert "accelerator" not in str(away["deploymentSpec"]), "the workers have them"
    assert int(pods_of(waits)["exec-train"]["activeDeadlineSeconds"]) == 100 + 3600 + settings.SPARE_S


def test_without_a_path_there_is_no_volume(tmp_path: Path) -> None:
    _, platform = compiled(tmp_path, "storage.root=s3://bucket/shop", "source.path=s3://logs/{day}.csv")
    assert all("pvcMount" not in pod for pod in pods_of(platform).values())
    _, platform = compiled(tmp_path, "storage.root=s3://bucket/shop")
    assert all("pvcMount" in pod for pod in pods_of(platform).values()), "the logs are on it"


def test_the_image_is_the_configs_or_the_environments_or_this_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    monkeypatch.delenv("DES_IMAGE", raising=False)
    assert settings.image_of(config, settings.IMAGE) == settings.IMAGE
    monkeypatch.setenv("DES_IMAGE", "des-python@sha256:0")
    assert settings.image_of(config) == "des-python@sha256:0"
    assert settings.image_of(config_of(tmp_path, "cluster.image=mine:2")) == "mine:2"
    for untold in ("des-python", "registry:5000/des-python", "des-python:latest"):
        with pytest.raises(ConfigError, match="names no version"):
            settings.image_of(config_of(tmp_path, f"cluster.image={untold}"))


@pytest.mark.parametrize("address", ["http://me:hidden@mlflow:5000", "postgresql+psycopg://me:hidden@db/mlflow"])
def test_a_password_is_not_compiled(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="tracking_uri has a password") as caught:
        compile_to(config_of(tmp_path, f"registry.tracking_uri={address}"), str(tmp_path / "pipeline.yaml"))
    assert "hidden" not in str(caught.value)
    assert not (tmp_path / "pipeline.yaml").exists()


def test_it_compiles_to_the_golden_file(documents: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    pipeline, platform = (copy.deepcopy(document) for document in documents)
    # What is in a config, and by which kfp this was compiled, is no matter of the DAG.
    pipeline["root"]["inputDefinitions"]["parameters"]["config"]["defaultValue"] = ""
    pipeline["sdkVersion"] = ""
    text = yaml.dump_all([pipeline, platform], Dumper=yaml.CSafeDumper, width=120)
    if text != GOLDEN.read_text():
        (tmp_path / "training.yaml").write_text(text)
        pytest.fail(f"the compiled pipeline has changed; if that was meant: mv {tmp_path}/training.yaml {GOLDEN}")
