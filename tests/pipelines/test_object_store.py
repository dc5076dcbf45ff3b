"""Two days with logs, features, checkpoints and results on S3: nothing but MLflow's own database is local."""

from __future__ import annotations

from pathlib import Path

from des_core import storage
from des_core.config import load_config
from des_core.release import registry
from tests.pipelines.test_local import des

TOML = """
[run]
name = "shop"
[source]
path = "{bucket}/logs of a shop/{{day}}.csv"
ready = "{bucket}/logs of a shop/{{day}}/_SUCCESS"
time = "time"
[[fields]]
name = "user"
[[fields]]
name = "item"
[model]
name = "fm"
factors = 4
[train]
batch = 128
[optimizer.rows]
learning_rate = 0.05
[storage]
root = "{bucket}/des"
[registry]
embed_limit = 0
[gate]
max_auc_drop = 0.5
max_ne = 10
"""


def test_two_days_on_s3(bucket: str, tmp_path: Path) -> None:
    """The second day goes on from the first; weights above embed_limit stay in the bucket, and score from there."""
    assert des(tmp_path, "generate", "--out", "logs", "--days", "2", "--rows-per-day", "1500").code == 0
    for day in ("2026-01-01", "2026-01-02"):
        log = (tmp_path / f"logs/{day}.csv").read_bytes()
        storage.write_bytes(f"{bucket}/logs of a shop/{day}.csv", log)
        storage.write_bytes(f"{bucket}/logs of a shop/{day}/_SUCCESS", b"")
    (tmp_path / "shop.toml").write_text(TOML.format(bucket=bucket))
    ended = des(tmp_path, "run", "-c", "shop.toml", "--from", "2026-01-01", "--to", "2026-01-02")
    assert ended.code == 0, ended.error
    first, second = ended.answer["days"]
    assert (first["verdict"], second["verdict"], second["parent"]) == ("accept", "accept", "1")
    config = load_config(tmp_path / "shop.toml", (f"run.dir={tmp_path}/runs/shop",))
    assert config.storage.root == f"{bucket}/des"
    assert {"checkpoints", "days", "features", "runs", "report.html"} <= set(storage.list_folder(f"{bucket}/des"))
    local = {path.name for path in (tmp_path / "runs" / "shop").iterdir()}
    assert local <= {"mlflow.db", "artifacts", "pipeline", "run.log", "train.log", "evaluate.log"}, local
    parent = registry.parent(config)
    assert parent is not None and parent.version == "2" and parent.checkpoint.startswith("checkpoints/")
