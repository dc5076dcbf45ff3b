"""Secrets: none in the repository, and each one that a manifest names has its command in docs/operations.md."""

import re
from collections.abc import Iterator
from pathlib import Path

from tests.k8s.rendering import dicts
from tests.k8s.test_manifests import RENDERED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


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
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"} == made["des-s3"]
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
