"""The compiled DAG: the same bytes every time, one config parameter, no caching, strings between steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from des_core.config import Config
from des_core.errors import UserError
from pipelines.training import compile_to
from tests.finished import config_of

STEPS = ["evaluate", "gate", "ingest", "register", "resolve", "train"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return config_of(folder)


@pytest.fixture(scope="module")
def compiled(folder: Path, config: Config) -> dict[str, Any]:
    compile_to(config, str(folder / "first.yaml"))
    document: dict[str, Any] = next(yaml.safe_load_all((folder / "first.yaml").read_text()))
    return document


def test_the_same_config_compiles_to_the_same_bytes(folder: Path, config: Config, compiled: dict[str, Any]) -> None:
    compile_to(config, str(folder / "second.yaml"))
    assert (folder / "second.yaml").read_bytes() == (folder / "first.yaml").read_bytes()
    assert [path.name for path in folder.glob("*partial*")] == []


def test_the_resolved_config_is_the_one_parameter(compiled: dict[str, Any], config: Config) -> None:
    parameters = compiled["root"]["inputDefinitions"]["parameters"]
    assert sorted(parameters) == ["as_of", "config"]
    assert Config.model_validate_json(parameters["config"]["defaultValue"]) == config
    assert parameters["as_of"]["defaultValue"] == ""


def test_no_task_is_cached(compiled: dict[str, Any]) -> None:
    tasks = compiled["root"]["dag"]["tasks"]
    assert sorted(tasks) == STEPS
    assert all(task["cachingOptions"] == {} for task in tasks.values())


def test_steps_pass_strings_and_keep_their_order(compiled: dict[str, Any]) -> None:
    tasks = compiled["root"]["dag"]["tasks"]
    after = {name: set(task.get("dependentTasks", [])) for name, task in tasks.items()}
    order = ["resolve", "ingest", "train", "evaluate", "gate", "register"]
    assert all(before in after[name] for before, name in zip(order, order[1:], strict=False))
    for component in compiled["components"].values():
        assert "artifacts" not in component.get("inputDefinitions", {})
        kinds = {item["parameterType"] for item in component["inputDefinitions"]["parameters"].values()}
        assert kinds == {"STRING"}
        for artifact in component["outputDefinitions"].get("artifacts", {}).values():
            assert artifact["artifactType"]["schemaTitle"] in ("system.HTML", "system.Metrics")


def test_every_step_runs_in_our_image_and_installs_nothing(compiled: dict[str, Any]) -> None:
    for executor in compiled["deploymentSpec"]["executors"].values():
        assert "python" in executor["container"]["image"]
        assert not executor["container"]["image"].endswith(":latest")
        assert "pip install" not in json.dumps(executor)


def test_a_place_that_cannot_be_written_is_the_users_to_mend(config: Config, folder: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        compile_to(config, str(folder / "none" / "pipeline.yaml"))
