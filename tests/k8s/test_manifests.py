"""Every overlay renders, and what it renders is what a cluster with Pod Security ``restricted`` accepts."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from des_core import __version__
from des_core.config import Config, load_config
from k8s import jobs, manifest
from k8s.pytorch import PYTORCH
from k8s.ray import RAY
from tests.k8s.rendering import MERGE_KEYS, Object, dicts, render

K8S = Path(__file__).parents[2] / "k8s"
KUBERNETES = "1.34"
OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())
KUBECTL = shutil.which("kubectl")
IMAGE = f"ghcr.io/des/des-python:{__version__}"

FOLDERS = {name: K8S / "overlays" / name for name in OVERLAYS}
# Postgres is in no overlay of ours.
FOLDERS["postgres"] = Path(__file__).parent / "postgres"
RENDERED = {name: render(folder) for name, folder in FOLDERS.items()}

LONG_RUNNING = ("Deployment", "StatefulSet")


def template_of(found: Object) -> Object | None:
    """The pod template of an object that makes pods."""
    kind, spec = found["kind"], found.get("spec", {})
    if kind == "PodTemplate":
        return found["template"]  # type: ignore[no-any-return]
    if kind == "CronJob":
        return spec["jobTemplate"]["spec"]["template"]  # type: ignore[no-any-return]
    if kind == "PyTorchJob":
        return spec["pytorchReplicaSpecs"]["Worker"]["template"]  # type: ignore[no-any-return]
    if kind == "RayJob":
        return spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]  # type: ignore[no-any-return]
    return spec["template"] if kind in (*LONG_RUNNING, "Job") else None


def _training_jobs() -> list[tuple[str, Object]]:
    """What the job client makes of each overlay's PodTemplate."""
    asked = jobs.Job(
        name="demo-0123456789",
        image=IMAGE,
        command=("torchrun", "-m", "des_core.engine.trainer"),
        env={"DES": "1"},
        nodes=2,
        nproc_per_node=1,
        cpu="1",
        memory="2048Mi",
        gpus=1,
        deadline_s=60.0,
    )
    templates = [(name, one) for name in OVERLAYS for one in RENDERED[name] if one["kind"] == "PodTemplate"]
    kinds = {PYTORCH.template: PYTORCH, RAY.template: RAY}
    made = [(name, manifest.render(kinds[one["metadata"]["name"]], one, asked)) for name, one in templates]
    assert len(made) == len(OVERLAYS) + 2, "production and kubeflow have both kinds"
    return made


OBJECTS = [(name, found) for name, objects in RENDERED.items() for found in objects]
MAKERS = [(name, found) for name, found in [*OBJECTS, *_training_jobs()] if template_of(found)]


def name_of(part: Any) -> str:
    return part if isinstance(part, str) else f"{part['kind']}-{part['metadata']['name']}"


@pytest.mark.parametrize(("overlay", "found"), OBJECTS, ids=name_of)
def test_every_object_is_valid_to_the_last_key(overlay: str, found: Object) -> None:
    kubernetes_validate.validate(found, KUBERNETES, strict=True)
    assert found["metadata"]["labels"]["app.kubernetes.io/part-of"] == "des"


def test_an_unknown_key_is_not_valid() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(RENDERED["kind"][0] | {"specs": {}}, KUBERNETES, strict=True)


@pytest.mark.parametrize(("overlay", "found"), MAKERS, ids=name_of)
def test_every_pod_is_restricted_bounded_and_watched(overlay: str, found: Object) -> None:
    assert pod_faults(found) == []


def pod_faults(found: Object) -> list[str]:
    """What a strict cluster, or a strict reader, would not let pass."""
    template = template_of(found)
    assert template is not None
    spec, labels = template["spec"], template["metadata"]["labels"]
    around = spec["securityContext"]
    token = labels["app.kubernetes.io/component"] == "step"
    checks = {
        "labels": labels["app.kubernetes.io/part-of"] == "des",
        "user": around["runAsNonRoot"] is True and around["runAsUser"] > 0 and around["runAsGroup"] > 0,
        "seccomp": around["seccompProfile"] == {"type": "RuntimeDefault"},
        "token": spec["automountServiceAccountToken"] is token,
        "service links": spec["enableServiceLinks"] is False,
        "host": not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(),
        "volumes": all({"emptyDir", "persistentVolumeClaim", "configMap"} & one.keys() for one in spec["volumes"]),
        "scratch": all("sizeLimit" in one["emptyDir"] for one in spec["volumes"] if "emptyDir" in one),
        "init": "initContainers" not in spec,
    }
    for container in spec["containers"]:
        inner, limits = container["securityContext"], container["resources"]["limits"]
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        checks |= {
            "escalation": inner["allowPrivilegeEscalation"] is False and "privileged" not in inner,
            "capabilities": inner["capabilities"] == {"drop": ["ALL"]},
            "root": inner["readOnlyRootFilesystem"] is True and "/tmp" in mounts,
            "limits": {"cpu", "memory"} <= limits.keys(),
            "requests": {"cpu", "memory"} <= container["resources"]["requests"].keys(),
            "image": bool(re.search(r":[\w.-]+$", container["image"])) and not container["image"].endswith(":latest"),
            "pull": container["imagePullPolicy"] == "IfNotPresent",
        }
        if found["kind"] in LONG_RUNNING:
            checks["probes"] = {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
    return sorted(name for name, kept in checks.items() if not kept)


def test_the_policy_can_fail() -> None:
    (deployment,) = [one for one in RENDERED["kind"] if name_of(one) == "Deployment-mlflow"]
    loose = yaml.safe_load(yaml.safe_dump(deployment))
    container = loose["spec"]["template"]["spec"]["containers"][0]
    container["image"] = "mlflow:latest"
    del container["resources"]["limits"]["memory"], container["livenessProbe"]
    container["securityContext"]["privileged"] = True
    assert pod_faults(loose) == ["escalation", "image", "limits", "probes"]


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed; the tests' own renderer stands in for it")
@pytest.mark.parametrize("overlay", FOLDERS)
def test_kubectl_renders_the_same(overlay: str) -> None:
    command = [str(KUBECTL), "kustomize", str(FOLDERS[overlay])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = {name_of(found): found for found in yaml.safe_load_all(done.stdout)}
    ours = {name_of(found): found for found in RENDERED[overlay]}
    assert sorted(theirs) == sorted(ours)
    for name, found in ours.items():
        assert _in_order(theirs[name]) == _in_order(found)


def _in_order(found: Object) -> Object:
    """With lists whose order says nothing sorted."""
    for table in dicts(found):
        for key, by in MERGE_KEYS.items():
            if isinstance(table.get(key), list):
                table[key] = sorted(table[key], key=lambda item: item[by])
    return found


@pytest.mark.parametrize("overlay", RENDERED)
def test_one_image_set_in_one_place(overlay: str) -> None:
    """Steps, workers, MLflow and serving run the same image, and steps tell workers which."""
    tables = [table for found in RENDERED[overlay] for table in dicts(found)]
    images = {table["image"] for table in tables if "image" in table} - {"docker.io/library/postgres:17.6"}
    told = {table["value"] for table in tables if table.get("name") == "DES_IMAGE"}
    assert images == {IMAGE} and told <= images


@pytest.mark.parametrize("overlay", ["kind", "production"])
def test_another_image_reaches_all(overlay: str, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    page = tmp_path / "k8s" / "overlays" / overlay / "kustomization.yaml"
    page.write_text(page.read_text().replace(f"newTag: {__version__}", "newTag: abc"))
    tables = [table for found in render(page.parent) for table in dicts(found)]
    values = [table["image"] for table in tables if "image" in table]
    values += [table["value"] for table in tables if table.get("name") == "DES_IMAGE"]
    assert len(values) > 4 and set(values) == {"ghcr.io/des/des-python:abc"}


def test_kustomizations_list_all_their_files() -> None:
    for page in K8S.rglob("kustomization.yaml"):
        text = page.read_text(encoding="utf-8")
        files = [file for file in page.parent.rglob("*") if file.is_file() and file != page]
        missing = [file.name for file in files if str(file.relative_to(page.parent)) not in text]
        assert not missing, page


def test_steps_have_exactly_the_rights_that_the_job_client_uses() -> None:
    (role,) = [found for found in RENDERED["kind"] if found["kind"] == "Role"]
    granted = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert not any("*" in right for right in granted)
    assert granted == {
        (group, resource, verb)
        for group, resources in jobs.RIGHTS.items()
        for resource, verbs in resources.items()
        for verb in verbs
    }


@pytest.mark.parametrize(
    ("overlay", "account"),
    [
        ("kind", ("des-pipeline", "des")),
        ("production", ("des-pipeline", "des")),
        ("kubeflow", ("pipeline-runner", "kubeflow")),
    ],
)
def test_the_rights_go_to_the_account_that_steps_have(overlay: str, account: tuple[str, str]) -> None:
    (binding,) = [found for found in RENDERED[overlay] if found["kind"] == "RoleBinding"]
    assert [(one["name"], one["namespace"]) for one in binding["subjects"]] == [account]
    assert binding["metadata"]["namespace"] == account[1]
    steps = [found for found in RENDERED[overlay] if found["kind"] in ("Job", "CronJob")]
    assert all(one["spec"]["serviceAccountName"] == account[0] for one in map(template_of, steps) if one)


def test_whatever_is_mounted_or_run_as_exists() -> None:
    for objects in RENDERED.values():
        names = {(found["kind"], found["metadata"]["name"]) for found in objects}
        for found in objects:
            spec = (template_of(found) or {"spec": {}})["spec"]
            claims = [
                one["persistentVolumeClaim"]["claimName"]
                for one in spec.get("volumes", [])
                if "persistentVolumeClaim" in one
            ]
            maps = [one["configMap"]["name"] for one in spec.get("volumes", []) if "configMap" in one]
            wanted = {("PersistentVolumeClaim", claim) for claim in claims} | {("ConfigMap", one) for one in maps}
            wanted |= {("ServiceAccount", spec[key]) for key in ("serviceAccountName",) if key in spec}
            assert wanted <= names


def test_every_service_finds_its_pods() -> None:
    for objects in RENDERED.values():
        templates = [
            template for found in objects if found["kind"] in LONG_RUNNING and (template := template_of(found))
        ]
        for service in [found for found in objects if found["kind"] == "Service"]:
            wanted = service["spec"]["selector"].items()
            (pod,) = [one for one in templates if wanted <= one["metadata"]["labels"].items()]
            ports = {port["name"]: port["containerPort"] for one in pod["spec"]["containers"] for port in one["ports"]}
            assert all(ports[port["targetPort"]] == port["port"] for port in service["spec"]["ports"])


@pytest.mark.filterwarnings("ignore:.*noload")  # MLflow's server, of SQLAlchemy
def test_mlflow_answers_to_all_names_of_its_service_and_to_no_other() -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    for objects in RENDERED.values():
        (found,) = [one for one in objects if name_of(one) == "Deployment-mlflow"]
        (container,) = found["spec"]["template"]["spec"]["containers"]
        (allowed,) = [word.partition("=")[2] for word in container["args"] if word.startswith("--allowed-hosts=")]
        space = found["metadata"]["namespace"]
        for name in ("mlflow", f"mlflow.{space}", f"mlflow.{space}.svc", f"mlflow.{space}.svc.cluster.local"):
            assert is_allowed_host_header(allowed.split(","), name)
            assert is_allowed_host_header(allowed.split(","), f"{name}:5000")
        assert is_allowed_host_header(allowed.split(","), "127.0.0.1:40123")
        assert not is_allowed_host_header(allowed.split(","), "evil.example:5000")
        probe = container["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 120


def config_of(overlay: str) -> Config:
    return load_config(K8S / "overlays" / overlay / "config.toml")


@pytest.mark.parametrize("overlay", ["kind", "production"])
def test_the_config_fits_the_overlay(overlay: str) -> None:
    config, objects = config_of(overlay), RENDERED[overlay]
    tables = [table for found in objects for table in dicts(found)]
    assert config.cluster.backend == "pytorchjob" and config.registry.tracking_uri == "http://mlflow:5000"
    assert {table["value"] for table in tables if table.get("name") == "MODEL"} == {config.run.name}
    assert {table["value"] for table in tables if table.get("name") == "MLFLOW_TRACKING_URI"} == {"http://mlflow:5000"}
    claims = {table["claimName"] for table in tables if "claimName" in table}
    assert config.storage.root.startswith("/data/" if "des-storage" in claims else "s3://")
    gpus = any("nvidia.com/gpu" in table for table in tables)
    assert (config.cluster.gpus > 0) == gpus == (config.train.device == "cuda")


def test_a_run_once_and_a_run_every_day_are_the_same_job() -> None:
    once = yaml.safe_load((K8S / "components" / "run-once" / "job.yaml").read_text(encoding="utf-8"))["spec"]
    daily = yaml.safe_load((K8S / "components" / "cron" / "cronjob.yaml").read_text(encoding="utf-8"))["spec"]
    container = daily["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][-2:] == ["--as-of", "yesterday"] and daily["concurrencyPolicy"] == "Forbid"
    container["args"] = container["args"][:-2]
    assert daily["jobTemplate"]["spec"] == once


def test_production_survives_a_lost_node_and_grows() -> None:
    kinds = {found["kind"]: found for found in RENDERED["production"]}
    assert kinds["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert kinds["HorizontalPodAutoscaler"]["spec"]["minReplicas"] >= 2
    (serving,) = [found for found in RENDERED["production"] if name_of(found) == "Deployment-des-serving"]
    assert "replicas" not in serving["spec"], "applying the overlay again would undo what the autoscaler did"
