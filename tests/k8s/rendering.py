"""What kustomize makes of an overlay, in so far as ours use it: tests need no kubectl, and an unknown key is an error.

A kustomization is read in kustomize's order: resources, components, generators, patches, namespace, labels, images,
replacements. test_manifests.py holds it equal to kubectl's, where that is installed.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

KEYS = {
    "apiVersion",
    "kind",
    "resources",
    "components",
    "configMapGenerator",
    "patches",
    "namespace",
    "labels",
    "images",
    "replacements",
}

MERGE_KEYS = {"containers": "name", "volumes": "name", "env": "name", "volumeMounts": "mountPath"}
"""Lists whose items a strategic merge finds by a key; others are replaced whole."""


def render(folder: Path, given: list[Object] | None = None) -> list[Object]:
    """All objects of a kustomization; of a component, those ``given`` to it as well."""
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert set(plan) <= KEYS, f"{folder}: the tests' renderer does not know {set(plan) - KEYS}"
    objects = list(given or [])
    for name in plan.get("resources", []):
        path = folder / name
        objects += render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    for name in plan.get("components", []):
        objects = render(folder / name, objects)
    objects += [_config_map(folder, generator) for generator in plan.get("configMapGenerator", [])]
    for patch in plan.get("patches", []):
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text(encoding="utf-8")
        objects = _patched(objects, yaml.safe_load(text))
    for found in objects:
        _place(found, plan)
    for replacement in plan.get("replacements", []):
        _replace(objects, replacement)
    return objects


def dicts(value: Any) -> Iterator[Object]:
    """Every table inside a value, and the value itself."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from dicts(inner)


def _config_map(folder: Path, generator: Object) -> Object:
    assert generator.pop("options") == {"disableNameSuffixHash": True} and set(generator) == {"name", "files"}
    data = {Path(name).name: (folder / name).read_text(encoding="utf-8") for name in generator["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}


def _patched(objects: list[Object], patch: Object) -> list[Object]:
    name = (patch["kind"], patch["metadata"]["name"])
    (target,) = [found for found in objects if (found["kind"], found["metadata"]["name"]) == name]
    if patch.get("$patch") == "delete":
        return [found for found in objects if found is not target]
    return [_merged(found, patch) if found is target else found for found in objects]


def _merged(base: Any, patch: Any, key: str = "") -> Any:
    """A strategic merge: tables by key, some lists by an item's key, null and $patch: delete take away."""
    if isinstance(base, dict) and isinstance(patch, dict):
        result = base | {name: _merged(base.get(name), value, name) for name, value in patch.items()}
        return {name: value for name, value in result.items() if value is not None}
    if isinstance(base, list) and key in MERGE_KEYS:
        by = MERGE_KEYS[key]
        changes = {item[by]: item for item in patch}
        items = {item[by]: item for item in base}
        whole = items | {name: _merged(items.get(name, {}), change) for name, change in changes.items()}
        return [item for name, item in whole.items() if changes.get(name, {}).get("$patch") != "delete"]
    return copy.deepcopy(patch)


def _place(found: Object, plan: Object) -> None:
    """Namespace, labels and images."""
    if "namespace" in plan:
        found["metadata"]["name" if found["kind"] == "Namespace" else "namespace"] = plan["namespace"]
    for label in plan.get("labels", []):
        assert set(label) == {"pairs"}
        found["metadata"]["labels"] = found["metadata"].get("labels", {}) | label["pairs"]
    for table in dicts(found):
        for container in table.get("containers", []) if isinstance(table.get("containers"), list) else []:
            for image in plan.get("images", []):
                if container["image"].rpartition(":")[0] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"


def _replace(objects: list[Object], replacement: Object) -> None:
    def select(wanted: Object) -> Object:
        name = (wanted["kind"], wanted["name"])
        (found,) = [one for one in objects if (one["kind"], one["metadata"]["name"]) == name]
        return found

    def step(place: Any, word: str) -> Any:
        if not word.startswith("["):
            return place[word]
        key, _, name = word[1:-1].partition("=")
        (found,) = [item for item in place if item[key] == name]
        return found

    def follow(place: Any, words: list[str]) -> Any:
        for word in words:
            place = step(place, word)
        return place

    source = replacement["source"]
    value = follow(select(source), source["fieldPath"].split("."))
    for target in replacement["targets"]:
        for path in target["fieldPaths"]:
            *words, last = path.split(".")
            follow(select(target["select"]), words)[last] = value
