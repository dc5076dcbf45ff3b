"""Two days with logs, features, checkpoints and results on S3: nothing but MLflow's own database is local."""

from __future__ import annotations

from pathlib import Path

from components import finished, stages
from des_core import storage
from des_core.config import Config, load_config
from des_core.contracts import Reference
from des_core.data.read import synthetic
from des_core.release.registry import registry
from des_core.run import Run, reopen

DAYS = ("2026-01-01", "2026-01-02")

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
# 150 rows judge: chance alone moves their AUC by 0.05.
min_auc = 0.3
max_auc_drop = 0.5
max_ne = 10
"""


def play(config: Config, day: str) -> Run:
    """All steps of a day, in this process but for the workers."""
    assert stages.resolve(config, day).reference == day
    run = reopen(config, Reference.parse(stages.ingest_and_pin(config, day).reference))
    for step in (stages.score, stages.train, stages.evaluate, stages.gate, stages.register):
        assert not step(run).unchanged, step.__name__
    return run


def test_two_days_on_s3(bucket: str, tmp_path: Path) -> None:
    """The second day goes on from the first; weights above embed_limit stay in the bucket, and score from there."""
    for day, log in zip(DAYS, synthetic.generate(str(tmp_path / "logs"), 2, 1500, 0), strict=True):
        storage.write_bytes(f"{bucket}/logs of a shop/{day}.csv", Path(log).read_bytes())
        storage.write_bytes(f"{bucket}/logs of a shop/{day}/_SUCCESS", b"")
    (tmp_path / "shop.toml").write_text(TOML.format(bucket=bucket))
    config = load_config(tmp_path / "shop.toml", (f"run.dir={tmp_path}/runs",))
    assert config.storage.root == f"{bucket}/des"
    first, second = (play(config, day) for day in DAYS)
    assert first.day is not None and second.day is not None
    assert (first.day.champion, second.day.champion) == ("", "1") and second.champion_checkpoint is not None
    assert storage.read_json(second.path("new_rows.json"))["samples"] == 1650
    parent = registry.parent(config)
    assert parent is not None and parent.version == "2" and parent.checkpoint.startswith("checkpoints/")
    assert {"checkpoints", "days", "features", "runs", "report.html"} <= set(storage.list_folder(f"{bucket}/des"))
    local = {path.name for path in (tmp_path / "runs").iterdir()}
    assert local <= {"mlflow.db", "artifacts", "score.log", "train.log", "evaluate.log"}, local
    again = finished.finished_run(config, DAYS[1])
    assert again is not None and again.key == second.key
