"""docs/operations.md: its secrets are those that pods name, its ``des`` and ``kubectl`` lines name what there is.

No secret is in the repository; each one that a manifest or a compiled pipeline names has its command on the page.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from pipelines import cli, settings
from tests.k8s.rendering import dicts
from tests.k8s.test_manifests import OVERLAYS, RENDERED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


LINES = [
    line.strip()
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
]


def _named() -> Iterator[tuple[str, str]]:
    """Secret and key of every reference; no key where all are taken."""
    for objects in RENDERED.values():
        for table in (table for found in objects for table in dicts(found)):
            if "secretKeyRef" in table:
                yield table["secretKeyRef"]["name"], table["secretKeyRef"]["key"]
            if "secretRef" in table:
                yield table["secretRef"]["name"], ""
            assert "imagePullSecrets" not in table and not isinstance(table.get("secret"), dict)


def _made() -> dict[str, set[str]]:
    """Secret: the keys that its command on the page gives it."""
    commands = re.findall(r"^kubectl .*create secret generic (\S+) (.*)$", PAGE, re.M)
    return {name: set(re.findall(r"--from-literal=(\w+)=", rest)) for name, rest in commands}


def test_every_secret_that_is_named_can_be_made() -> None:
    named, made = set(_named()), _made()
    assert {name for name, _ in named} == {"des-s3", "des-postgres", "des-webhook", "mlflow-database"}
    assert all(key in made[name] for name, key in named if key)
    assert all(set(keys) == made[name] for name, keys in settings.SECRETS.items())
    table = set(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.M))
    assert made.keys() <= table


def test_no_secret_is_in_the_repository() -> None:
    assert not [found for objects in RENDERED.values() for found in objects if found["kind"] == "Secret"]
    for table in (table for objects in RENDERED.values() for found in objects for table in dicts(found)):
        if re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY", str(table.get("name"))):
            assert "value" not in table
    values = re.findall(r"--from-literal=\w+=(\S+)", PAGE)
    assert all(re.search(r"\.\.\.|PASSWORD", value) for value in values)


def test_production_keeps_no_address_with_a_password() -> None:
    text = (ROOT / "k8s" / "overlays" / "production" / "config.toml").read_text(encoding="utf-8")
    assert not re.search(r"://[^/\s]*:[^/\s]*@", text)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("des ")])
def test_commands_of_des_take_these_options(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    with command.make_context(line, words):
        configs = [word for word in words if word.endswith(".toml")]
        assert all((ROOT / config).is_file() for config in configs)


def test_commands_of_kubectl_name_what_the_overlays_make() -> None:
    made = {(found["kind"].lower(), found["metadata"]["name"]) for objects in RENDERED.values() for found in objects}
    for line in [line for line in LINES if line.startswith("kubectl ")]:
        named = re.findall(r"\b(deployment|service|job|cronjob|rolebinding)[/ ]([a-z][\w-]*)", line.partition("#")[0])
        # Kubeflow's own, and what the page makes by hand.
        assert set(named) <= made | {("service", "ml-pipeline"), ("job", "first")}, line
        folders = re.findall(r"k8s/overlays/(\w+)", line)
        assert set(folders) <= set(OVERLAYS), line
