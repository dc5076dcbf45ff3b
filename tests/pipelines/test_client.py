"""Submit and schedule against an API server in this process, through the real client: what is there is found again,
one schedule of a name is enabled at most, and every refusal is one line."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from des_core.config import Config
from pipelines import cli, training
from pipelines.trigger import from_cron, from_interval
from tests.finished import config_of
from tests.pipelines.kfp_stub import KubeflowStub, serving

CLUSTER = [
    "storage.root=/data/shop",
    "registry.tracking_uri=http://mlflow:5000",
    "source.path=/data/logs/{day}.csv",
]
SIX = "0 0 3 * * *"


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    """The same config compiles to the same bytes (tested with the DAG), so each is compiled once here."""
    compile_to, known = training.compile_to, dict[str, bytes]()

    def remembered(config: Config, output: str) -> None:
        key = config.model_dump_json()
        if key not in known:
            compile_to(config, output)
            known[key] = Path(output).read_bytes()
        Path(output).write_bytes(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "compile_to", remembered)
        yield


@pytest.fixture
def kubeflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeflowStub]:
    for name in ("KFP_TOKEN", "KFP_NAMESPACE", "KFP_CA", "DES_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    with serving() as stub:
        monkeypatch.setenv("KFP_HOST", stub.host)
        yield stub


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    config_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = Path("shop.toml").read_text()
    # What stands in the file must mean something in a pod, even if --set changes it.
    Path("shop.toml").write_text(re.sub(r'(?m)^(path = )"(?!/)', r'\1"/data/', text))
    return "shop.toml"


def des(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    said = capsys.readouterr()
    return int(caught.value.code or 0), said.out, said.err


def settings() -> list[str]:
    return [word for change in CLUSTER for word in ("--set", change)]


def submit(capsys: pytest.CaptureFixture[str], toml: str, *words: str) -> dict[str, Any]:
    code, out, err = des(capsys, "submit", "-c", toml, *settings(), *words, "--json")
    assert (code, err) == (0, "")
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def schedule(capsys: pytest.CaptureFixture[str], toml: str, *words: str) -> dict[str, Any]:
    words = words if "--interval" in words or "--cron" in words else ("--cron", SIX, *words)
    code, out, err = des(capsys, "schedule", "create", "-c", toml, *settings(), *words, "--json")
    assert (code, err) == (0, "")
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    found, _, err = des(capsys, *words)
    assert found == code, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def test_a_run_is_started_and_shown(capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str) -> None:
    answer = submit(capsys, toml, "--as-of", "2026-01-03")
    (run,) = kubeflow.held["runs"]
    assert answer["run_id"] == run["run_id"]
    assert answer["page"] == f"{kubeflow.host}/#/runs/details/{run['run_id']}"
    assert run["display_name"] == "shop 2026-01-03"
    assert run["runtime_config"]["parameters"] == {"as_of": "2026-01-03"}
    assert "service_account" not in run, "Kubeflow's own account runs its pods"
    assert kubeflow.names("experiments") == kubeflow.names("pipelines") == ["shop"]
    code, out, _ = des(capsys, "submit", "-c", toml, *settings())
    assert code == 0
    assert f"run={kubeflow.held['runs'][1]['run_id']}" in out.splitlines()


def test_the_same_yaml_is_uploaded_once(capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str) -> None:
    first, again = submit(capsys, toml), submit(capsys, toml)
    assert (first["uploaded"], again["uploaded"]) == (True, False)
    assert first["version_id"] == again["version_id"]
    assert len(kubeflow.held["runs"]) == 2
    # Each of these changes the YAML, and the third neither code nor config digest.
    for change in ("train.epochs=7", "table.idle_steps=9", "cluster.memory=8Gi"):
        assert submit(capsys, toml, "--set", change)["uploaded"]
    assert not submit(capsys, toml)["uploaded"], "found behind the first page as well"
    names = kubeflow.names("pipeline_versions")
    assert len(set(names)) == len(names) == 4
    assert all(re.fullmatch(r"[a-z0-9.-]+-[0-9a-f]{10}-[0-9a-f]{10}", name) for name in names)
    assert kubeflow.names("pipelines") == ["shop"]


def test_what_another_makes_at_the_same_time_is_taken(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str
) -> None:
    submit(capsys, toml)
    empty = "{}"
    for kind in ("pipelines", "experiments", "pipelines/[^/]*/versions"):
        kubeflow.fail(f"GET /{kind}", 200, empty)
    answer = submit(capsys, toml)
    assert not answer["uploaded"]
    assert [len(kubeflow.held[kind]) for kind in ("pipelines", "pipeline_versions", "experiments")] == [1, 1, 1]


def test_experiment_and_namespace_are_the_users(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(capsys, toml, "--namespace", "team-a", "--experiment", "trials")
    assert kubeflow.names("experiments") == ["trials"]
    monkeypatch.setenv("KFP_NAMESPACE", "team-b")
    submit(capsys, toml)
    found = [one["namespace"] for kind in ("experiments", "pipelines") for one in kubeflow.held[kind]]
    assert found == ["team-a", "team-b", "team-a", "team-b"]


def test_a_pods_config_names_no_folder_of_this_machine(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str, tmp_path: Path
) -> None:
    submit(capsys, toml)
    sent = json.dumps(kubeflow.held["pipeline_versions"][0]["pipeline_spec"])
    assert str(tmp_path) not in sent
    assert str(Path.home()) not in sent or str(Path.home()) == "/"


def test_a_schedule_runs_yesterday_alone_and_never_catches_up(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str
) -> None:
    answer = schedule(capsys, toml, "--cron", "0 3 * * *")
    (made,) = kubeflow.held["recurring_runs"]
    assert answer["done"] == "made"
    assert made["display_name"] == "shop"
    assert made["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * *"}}
    assert (made["max_concurrency"], made["no_catchup"], made["mode"]) == ("1", True, "ENABLE")
    assert made["runtime_config"]["parameters"] == {"as_of": "yesterday"}


def test_the_same_schedule_again_changes_nothing(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str
) -> None:
    first = schedule(capsys, toml, "--interval", "24h")
    kubeflow.requests.clear()
    again = schedule(capsys, toml, "--interval", "1d")
    assert again["done"] == "unchanged"
    assert again["schedule_id"] == first["schedule_id"]
    assert {request.split()[0] for request in kubeflow.requests} == {"GET"}
    assert kubeflow.held["recurring_runs"][0]["trigger"] == {"periodic_schedule": {"interval_second": "86400"}}


def test_a_changed_schedule_replaces_the_old_one_and_no_two_are_ever_enabled(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str
) -> None:
    ids = [schedule(capsys, toml)["schedule_id"]]
    for words in (["--interval", "24h"], ["--cron", "0 0 4 * * *"], ["--set", "train.epochs=9"], ["--experiment", "e"]):
        answer = schedule(capsys, toml, *words)
        assert answer["done"] == "replaced"
        ids.append(answer["schedule_id"])
        (held,) = kubeflow.held["recurring_runs"]
        assert (held["recurring_run_id"], held["mode"]) == (ids[-1], "ENABLE")
    assert len(set(ids)) == 5
    assert kubeflow.most_enabled == 1


@pytest.mark.parametrize("broken", ["POST /recurringruns", "POST .*:disable", "POST .*:enable", "DELETE .*"])
def test_a_failure_on_the_way_is_mended_by_the_same_command(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str, broken: str
) -> None:
    schedule(capsys, toml)
    kubeflow.fail(broken, 500)
    words = ["schedule", "create", "-c", toml, *settings(), "--interval", "12h"]
    line = refused(capsys, *words, code=1)
    assert "(500): the database is away" in line
    enabled = [one["recurring_run_id"] for one in kubeflow.held["recurring_runs"] if one["mode"] == "ENABLE"]
    assert len(enabled) == 1 or "schedule shop is disabled until the same command succeeds" in line
    assert schedule(capsys, toml, "--interval", "12h")["done"] in ("replaced", "resumed", "unchanged")
    (held,) = kubeflow.held["recurring_runs"]
    assert held["trigger"] == {"periodic_schedule": {"interval_second": "43200"}}
    assert held["mode"] == "ENABLE"
    assert kubeflow.most_enabled == 1


def test_a_half_replaced_schedule_is_not_resumed_and_the_message_says_what_to_run(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str
) -> None:
    schedule(capsys, toml)
    kubeflow.fail("POST .*:enable", 500)
    refused(capsys, "schedule", "create", "-c", toml, *settings(), "--interval", "12h", code=1)
    line = refused(capsys, "schedule", "resume", "shop")
    assert "schedule shop was left half replaced: a des schedule create was interrupted" in line
    assert "run the same des schedule create command again" in line
    assert kubeflow.most_enabled == 1
    assert schedule(capsys, toml, "--interval", "12h")["done"] == "resumed"
    assert des(capsys, "schedule", "resume", "shop")[0] == 0


def test_schedules_are_listed_paused_resumed_and_deleted(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str
) -> None:
    for name in ("shop", "a", "b", "c"):
        schedule(capsys, toml, "--set", f"run.name={name}")
    foreign = {**kubeflow.held["recurring_runs"][0], "recurring_run_id": "x", "description": "made by hand"}
    kubeflow.held["recurring_runs"].append(foreign)

    def listed() -> dict[str, bool]:
        code, out, _ = des(capsys, "schedule", "list", "--json")
        assert code == 0
        return {one["name"]: one["enabled"] for one in json.loads(out.splitlines()[-1])["schedules"]}

    assert listed() == {"a": True, "b": True, "c": True, "shop": True}
    assert des(capsys, "schedule", "pause", "shop")[1] == "paused=shop\n"
    assert not listed()["shop"]
    assert des(capsys, "schedule", "resume", "shop")[0] == 0
    assert listed()["shop"]
    des(capsys, "schedule", "pause", "shop")
    assert schedule(capsys, toml)["done"] == "resumed"
    assert des(capsys, "schedule", "delete", "shop")[0] == 0
    assert listed() == {"a": True, "b": True, "c": True}
    assert foreign in kubeflow.held["recurring_runs"], "what is not ours is left alone"
    assert "no schedule shop" in refused(capsys, "schedule", "pause", "shop")
    assert "there are: a, b, c" in refused(capsys, "schedule", "delete", "shop")
    assert "cron 0 0 3 * * *, version " in des(capsys, "schedule", "list")[1]


def test_a_schedule_deleted_meanwhile_is_no_error(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str
) -> None:
    schedule(capsys, toml)
    kubeflow.fail("DELETE .*", 404, "not found")
    assert des(capsys, "schedule", "delete", "shop")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cron", SIX], "Missing option '-c' / '--config'; see: des schedule create --help"),
        (["-c", "shop.toml"], 'give one of --cron "0 0 3 * * *" and --interval 24h'),
        (["-c", "shop.toml", "--cron", SIX, "--interval", "24h"], "give one of --cron"),
        (["-c", "shop.toml", "--cron", "@daily"], 'six fields, like "0 0 3 * * *"'),
        (["-c", "shop.toml", "--cron", "0 25 * * *"], "'25' is no value of hours (0-23)"),
        (["-c", "shop.toml", "--interval", "24"], "write a number and s, m, h or d"),
    ],
)
def test_a_wrong_schedule_is_refused_before_anything_is_asked(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str, words: list[str], message: str
) -> None:
    assert message in refused(capsys, "schedule", "create", *words)
    assert kubeflow.requests == []


@pytest.mark.parametrize(
    ("given", "cron"),
    [
        ("0 3 * * *", "0 0 3 * * *"),
        ("30 0 3 * * *", "30 0 3 * * *"),
        ("  0  */6  *  * MON-FRI ", "0 0 */6 * * MON-FRI"),
        ("0 0 3 1,15 jan-jun ?", "0 0 3 1,15 jan-jun ?"),
    ],
)
def test_a_cron_line_has_six_fields(given: str, cron: str) -> None:
    assert from_cron(given).cron == cron


@pytest.mark.parametrize(
    "line",
    [
        "",
        "3",
        "* * * *",
        "0 0 3 * * * 2026",
        "60 0 3 * * *",
        "0 0 3 0 * *",
        "0 0 3-1 * * *",
        "0 0 1-2-3 * * *",
        "0 */0 3 * * *",
        "0 0 x * * *",
        "@every 1h",
        "0 0 3 * * MO",
    ],
)
def test_another_line_is_refused_with_an_example(line: str) -> None:
    with pytest.raises(Exception, match="seconds first: every day at 03:00") as caught:
        from_cron(line)
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]


def test_intervals_are_seconds() -> None:
    assert [from_interval(text).interval_s for text in ("24h", "1d", "90m", "45s")] == [86400, 86400, 5400, 45]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["storage.root=runs/shop"], "storage.root = 'runs/shop' is a relative path"),
        (["registry.tracking_uri=sqlite:///mlflow.db"], "tracking_uri = 'sqlite:///mlflow.db' is a relative path"),
        (["source.path=logs/{day}.csv"], "source.path = 'logs/{day}.csv' is a relative path"),
        (["storage.root=/database"], "storage.root = /database is not on the cluster's volume; put it under /data"),
        (["source.path=/home/me/{day}.csv"], "source.path = /home/me/{day}.csv is not on the cluster's volume"),
        (["registry.tracking_uri=sqlite:////root/m.db"], "tracking_uri = sqlite:////root/m.db is a file that goes"),
        (["registry.tracking_uri=http://me:hidden@mlflow"], "registry.tracking_uri has a password in it"),
        (["storage.root=s3://me:hidden@bucket"], "storage.root has a password in it"),
        (["cluster.image=des-python:latest"], "cluster.image = 'des-python:latest' names no version"),
        (["cluster.image=registry:5000/des-python"], "names no version"),
        (["cluster.memory=1.5Gi"], "cluster.memory = '1.5Gi' must be whole"),
        (["storage.root="], "storage.root is not set"),
    ],
)
def test_what_no_pod_could_use_is_refused_before_anything_is_uploaded(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str, changes: list[str], message: str
) -> None:
    more = [word for change in changes for word in ("--set", change)]
    for command in (["submit"], ["schedule", "create", "--cron", SIX]):
        line = refused(capsys, *command, "-c", toml, *settings(), *more)
        assert message in line
        assert "hidden" not in line
    assert kubeflow.requests == []


def test_a_registry_on_the_volume_will_do(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str
) -> None:
    submit(capsys, toml, "--set", "registry.tracking_uri=sqlite:////data/mlflow.db")
    submit(capsys, toml, "--set", "storage.root=s3://bucket/shop")


def test_a_wrong_day_is_refused(capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str) -> None:
    assert "write it like 2026-01-31" in refused(capsys, "submit", "-c", toml, *settings(), "--as-of", "tomorrow")


def test_the_token_opens_and_nothing_else_does(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, toml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeflow.token = "opensesame"
    assert "(401); give a valid token in KFP_TOKEN" in refused(capsys, "submit", "-c", toml, *settings())
    assert kubeflow.held["pipelines"] == []
    monkeypatch.setenv("KFP_TOKEN", "wrong")
    assert "wrong" not in refused(capsys, "schedule", "list")
    monkeypatch.setenv("KFP_TOKEN", "opensesame\n")
    submit(capsys, toml)


@pytest.mark.parametrize(
    ("status", "body", "code", "message"),
    [
        (403, '{"message": "denied to list"}', 2, "(403, namespace none given): denied to list"),
        (404, "<html>no such page</html>", 2, "(404): <html>no such page</html>; check --host"),
        (400, '{"message": "namespace\\nis missing"}', 2, "(400, namespace none given): namespace is missing"),
        (409, '{"error": "changed"}', 1, "another was quicker (409): changed"),
        (500, '{"error_message": "no database"}', 1, "failed to list schedules (500): no database"),
        (503, "upstream connect error", 1, "(503): upstream connect error"),
        (302, "<a href='/dex/auth'>", 2, "give a valid token in KFP_TOKEN"),
        (200, "<html>Log in</html>", 2, "(a login page?)"),
    ],
)
def test_a_refusal_is_one_line_with_the_servers_reason(
    capsys: pytest.CaptureFixture[str],
    kubeflow: KubeflowStub,
    status: int,
    body: str,
    code: int,
    message: str,
) -> None:
    kubeflow.fail("GET /recurringruns", status, body)
    assert message in refused(capsys, "schedule", "list", code=code)


def test_nobody_there_is_one_line(
    capsys: pytest.CaptureFixture[str], kubeflow: KubeflowStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
    line = refused(capsys, "schedule", "list", "--host", gone, code=1)
    assert f"Kubeflow at {gone} cannot be reached" in line
    assert "Connection refused" in line
    refused(capsys, "schedule", "list", "--host", "http://nowhere.invalid", code=1)
    monkeypatch.delenv("KFP_HOST")
    assert "give --host" in refused(capsys, "schedule", "list")
    assert "write it like https://" in refused(capsys, "schedule", "list", "--host", "kubeflow:8080")
    assert "secret" not in refused(capsys, "schedule", "list", "--host", "https://me:secret@kubeflow")


def test_a_certificate_of_ones_own_is_trusted_by_name(
    capsys: pytest.CaptureFixture[str], toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = own_certificate(tmp_path)
    with serving(certificate, key) as stub:
        words = ["schedule", "list", "--host", stub.host]
        assert "certificate verify failed" in refused(capsys, *words, code=1)
        monkeypatch.setenv("KFP_CA", str(tmp_path / "none.pem"))
        assert "none.pem: no such file" in refused(capsys, *words)
        monkeypatch.setenv("KFP_CA", certificate)
        assert des(capsys, *words) == (0, "", "")


def own_certificate(folder: Path) -> tuple[str, str]:
    """Files of a certificate for 127.0.0.1 that signs itself, and of its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    signed = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "own.pem").write_bytes(signed.public_bytes(pem))
    (folder / "own.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return str(folder / "own.pem"), str(folder / "own.key")


def test_listing_schedules_needs_no_kfp() -> None:
    code = (
        "import sys; import pipelines.client; "
        "assert 'kfp' not in sys.modules and 'kubernetes' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
