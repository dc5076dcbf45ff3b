"""N workers are one worker; stopped and resumed is never stopped; counted bytes are the predicted ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.contracts import Dataset
from des_core.errors import CheckpointError
from tests.engine import tiny
from tests.engine.group import Group

MODELS = {
    "lr": {},
    "fm": {},
    "fwfm": {},
    "wide_deep": {},
    "deepfm": {},
    "dcn": {},
    "dcn stacked": {"structure": "stacked"},
    "dcn_v2": {"cross_rank": 3},
    "dcn_v2 stacked": {"cross_rank": 3, "structure": "stacked"},
    "dcn_v2 full": {"cross_rank": 0},
    "dlrm": {"bottom": [5]},
    "autoint": {"attention_width": 3},
    "finalmlp": {
        "gate_fields": [["user"], ["item", "age"]],
        "gate_width": 3,
        "hidden2": [4],
        "hidden": [6, 4],
        "heads": 2,
    },
    "gdcn": {"cross_rank": 3},
    "masknet": {"mask_blocks": 2, "mask_width": 5},
    "masknet stacked": {"mask_blocks": 2, "mask_width": 9, "structure": "stacked"},
    "fibinet": {},
}
GATHERS = ("fwfm", "dlrm", "autoint", "masknet", "fibinet")
SUMS = [name for name in MODELS if name.split()[0] not in GATHERS and name != "dcn_v2 full"]
ALONE = {"lr": ["sum"], "dcn_v2 full": ["gather"]} | {n: ["gather"] for n in MODELS if n.split()[0] in GATHERS}
"""Where ``train.exchange`` has nothing else to choose from."""
ADAM = {"rows": {"name": "adam", "learning_rate": 0.01}, "dense": {"name": "adam", "learning_rate": 0.01}}


def train(group: Group, root: Path, resume: bool = False, **sections: dict[str, Any]) -> dict[str, Any]:
    """Train on a group; worker 0's answer, with ``rows`` over all workers."""
    config = tiny.config(root, **sections)
    manifest = root / "features" / "manifest.json"
    dataset = tiny.store(config) if not manifest.exists() else manifests.reference(str(manifest))
    answers = group.do("train", config=config.model_dump_json(), dataset=str(dataset), resume=resume)
    return answers[0] | {"rows": sum(answer["rows"] for answer in answers)}


ONE_WORKER: dict[tuple[str, str], dict[str, Any]] = {}


def exchanges(name: str) -> list[dict[str, str]]:
    kinds = [{"exchange": kind} for kind in [*ALONE.get(name, ["sum", "gather"]), "rows"]]
    return kinds + [{"exchange": "sum", "upper": "replicated"}] * (name in SUMS)


def turns() -> list[tuple[str, dict[str, str], list[tuple[str, int]]]]:
    """Each model by each exchange, with precision and workers of each comparison.

    What an exchange or an operator can do wrong shows on three workers. Slices and shards of other sizes, or empty, are
    each operator's own law (test_operators.py): here every model sees them, and fp32, by one exchange.
    """
    cases = []
    for number, name in enumerate(MODELS):
        hows = exchanges(name)
        for how in hows:
            more = [("fp64", 2), ("fp64", 4), ("fp64", 7)] if how == hows[number % len(hows)] else []
            more += [("fp32", 2)] if how == hows[(number + 3) % len(hows)] else []
            cases.append((name, how, [("fp64", 3), *more]))
    return cases


BOUNDS = {"fp64": 1e-9, "fp32": 1e-4}


@pytest.mark.parametrize(("name", "how", "comparisons"), turns())
def test_workers_do_not_change_the_model(
    group: Callable[[int], Group], tmp_path: Path, name: str, how: dict[str, str], comparisons: list[tuple[str, int]]
) -> None:
    """20 steps, a short last batch in each epoch, batch norm and dropout: method 7.1 in both precisions."""

    def trained(workers: int, precision: str, **settings: str) -> dict[str, Any]:
        return train(
            group(workers),
            tmp_path / f"{precision}{workers}",
            model={"name": name.split()[0], "batch_norm": True, "dropout": 0.2, **MODELS[name]},
            train={"precision": precision, "max_steps": 20, "epochs": 4, **settings},
            optimizer=ADAM,
        )

    for precision, workers in comparisons:
        if (name, precision) not in ONE_WORKER:
            ONE_WORKER[name, precision] = trained(1, precision)
        expected = ONE_WORKER[name, precision]
        got = trained(workers, precision, **how)
        a, b = np.array(got["logits"]), np.array(expected["logits"])
        assert got["step"] == 20 and got["rows"] == expected["rows"] and np.std(b) > 1e-3
        assert np.all(np.abs(a - b) <= BOUNDS[precision] * (1 + np.abs(b))), (workers, precision, np.abs(a - b).max())


def test_every_exchange_is_seen_on_every_number_of_workers_and_in_both_precisions() -> None:
    kinds = {str(how) for _, how, _ in turns()}
    for comparison in (("fp64", 2), ("fp64", 3), ("fp64", 4), ("fp64", 7), ("fp32", 2)):
        seen = [str(how) for _, how, comparisons in turns() if comparison in comparisons]
        assert {kind for kind in kinds if seen.count(kind) >= 2} == kinds


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad", "adamw"])
def test_every_rule_is_the_same_on_three_workers(group: Callable[[int], Group], tmp_path: Path, rule: str) -> None:
    rows = {"name": rule, "learning_rate": 0.05, "l2": 0.01}
    dense = {"name": "adamw" if rule == "adamw" else "adagrad", "learning_rate": 0.01}
    for settings in (rows, dense):
        if settings["name"] == "adamw":
            settings["weight_decay"] = 0.1
    logits = [
        train(
            group(workers),
            tmp_path / str(workers),
            train={"precision": "fp64", "max_steps": 12},
            optimizer={"rows": rows, "dense": dense},
        )["logits"]
        for workers in (1, 3)
    ]
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-9, atol=1e-9)


def test_a_batch_smaller_than_the_workers(group: Callable[[int], Group], tmp_path: Path) -> None:
    """Workers without a sample take part in every collective."""
    sections = {"train": {"batch": 3, "precision": "fp64", "max_steps": 8}, "model": {"batch_norm": True}}
    one, seven = (train(group(n), tmp_path / str(n), **sections) for n in (1, 7))
    np.testing.assert_allclose(seven["logits"], one["logits"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("workers", [1, 3])
def test_resumed_is_never_stopped(group: Callable[[int], Group], tmp_path: Path, workers: int) -> None:
    """Stopped inside epoch 2 by max_steps, then resumed to step 20: the same bits."""
    rows = {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
    sections: dict[str, Any] = {"model": {"batch_norm": True, "dropout": 0.3}, "optimizer": ADAM | {"rows": rows}}
    schedule: dict[str, Any] = {"epochs": 3, "lr_drop": 0.5, "patience": 9}
    schedule |= {"lr_schedule": "cosine", "warmup_steps": 5, "max_grad_norm": 0.02}
    whole = train(group(workers), tmp_path / "a", train={"max_steps": 20} | schedule, **sections)
    stopped = train(group(workers), tmp_path / "b", train={"max_steps": 13} | schedule, **sections)
    resumed = train(group(workers), tmp_path / "b", resume=True, train={"max_steps": 20} | schedule, **sections)
    assert (stopped["step"], resumed["step"]) == (13, 20)
    assert resumed["logits"] == whole["logits"]
    assert stopped["logits"] != whole["logits"]
    curves = {}
    for name in ("a", "b"):
        # Of the two runs in b the later one went further.
        written = [storage.read_json(str(path)) for path in (tmp_path / name).glob("runs/*/training.json")]
        curves[name] = max(written, key=lambda training: training["steps"])["history"]
    assert curves["a"] == curves["b"] and len(curves["a"]) == 20, "the loss curve too"


def test_workers_may_change_on_resume(group: Callable[[int], Group], tmp_path: Path) -> None:
    """Two workers' checkpoint, taken over by three, is a run that never changed hands."""
    sections: dict[str, Any] = {"model": {"batch_norm": True}, "optimizer": ADAM}
    whole = train(group(2), tmp_path / "a", train={"max_steps": 20, "precision": "fp64"}, **sections)
    train(group(2), tmp_path / "b", train={"max_steps": 11, "precision": "fp64"}, **sections)
    resumed = train(
        group(3), tmp_path / "b", resume=True, train={"max_steps": 20, "precision": "fp64", "workers": 3}, **sections
    )
    assert resumed["rows"] == whole["rows"]
    np.testing.assert_allclose(resumed["logits"], whole["logits"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["auto", "sum", "gather", "rows", "replicated"])
@pytest.mark.parametrize("name", ["fm", "deepfm", "dcn_v2"])
def test_counted_bytes_are_the_predicted_ones(
    group: Callable[[int], Group], tmp_path: Path, name: str, kind: str
) -> None:
    for workers in (1, 2, 3):
        root = tmp_path / str(workers)
        model = {"name": name, "batch_norm": True}
        how = {"upper": kind, "exchange": "sum"} if kind == "replicated" else {"exchange": kind}
        how |= {"max_grad_norm": 1.0} if name == "fm" else {}
        train(group(workers), root, model=model, train={"max_steps": 11, "workers": workers, **how})
        (folder,) = (root / "runs").iterdir()
        exchange = json.loads((folder / "training.json").read_text())["exchange"]
        assert {"dense gradients", "metrics"} <= set(exchange) and len(exchange) > 2
        for line, entry in exchange.items():
            assert entry["counted_bytes_per_step"] == pytest.approx(entry["predicted_bytes_per_step"], rel=1e-12), line
        total = sum(entry["counted_bytes_per_step"] for entry in exchange.values())
        assert (total > 0) == (workers > 1)


LIMITS: dict[str, dict[str, Any]] = {
    "one field, seven workers": {"fields": tiny.FIELDS[:1]},
    "a list of ten thousand values": {"longest": 10_000},
    "no row of the last fields": {"fields": (*tiny.FIELDS[:2], *tiny.FIELDS[6:])},
}


@pytest.mark.parametrize("how", [{"exchange": "sum"}, {"exchange": "gather"}, {"exchange": "rows"}])
@pytest.mark.parametrize("limit", LIMITS)
def test_odd_shapes_of_data_train(
    group: Callable[[int], Group], tmp_path: Path, limit: str, how: dict[str, str]
) -> None:
    """More workers than fields, very long lists, batches that nothing divides: N workers are still one."""
    logits = []
    for workers in (1, 7):
        config = tiny.config(
            tmp_path / str(workers), train={"batch": 97, "max_steps": 6, "precision": "fp64", **how}, optimizer=ADAM
        )
        dataset = tiny.store(config, **LIMITS[limit])
        answers = group(workers).do("train", config=config.model_dump_json(), dataset=str(dataset))
        logits.append(answers[0]["logits"])
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", [{"exchange": "sum"}, {"exchange": "rows"}, {"upper": "replicated"}])
def test_a_loss_that_is_no_number_names_its_samples(
    group: Callable[[int], Group], tmp_path: Path, how: dict[str, str]
) -> None:
    """All workers stop before the update, and say the same."""
    sections: dict[str, Any] = {
        "model": {"name": "fm"},
        "train": {"workers": 3, "max_steps": 20, "shuffle": False, "exchange": "sum", **how},
        "optimizer": {"rows": {"name": "sgd", "learning_rate": 1e30}},
    }
    said = r"loss is (nan|inf) at step 2 on worker [0-2], sample 0123456789abcdef:(9[6-9]|1[0-8][0-9]|19[01]).*; lower"
    with pytest.raises(AssertionError, match=said):
        train(group(3), tmp_path, **sections)


def test_sixteen_bits_on_the_wire(group: Callable[[int], Group], tmp_path: Path) -> None:
    """Half the bytes both ways for what goes home and back, counted as predicted; nearly the same logits."""
    seen = {}
    for payload in ("full", "bf16"):
        for kind in ("sum", "gather", "rows"):
            root = tmp_path / f"{payload}{kind}"
            settings = {"payload": payload, "exchange": kind, "max_steps": 12}
            answer = train(group(2), root, train={"workers": 2, **settings}, optimizer=ADAM)
            (folder,) = (root / "runs").iterdir()
            exchange = json.loads((folder / "training.json").read_text())["exchange"]
            for line, entry in exchange.items():
                assert entry["counted_bytes_per_step"] == pytest.approx(entry["predicted_bytes_per_step"], rel=1e-12)
                assert entry["counted_bytes_per_step"] == pytest.approx(
                    sum(entry[way]["counted_bytes_per_step"] for way in ("forward", "backward"))
                ), line
            seen[payload, kind] = (np.array(answer["logits"]), exchange)
    for kind, line in (("sum", "fc"), ("gather", "vectors"), ("rows", "rows")):
        (full, wide), (half, narrow) = seen["full", kind], seen["bf16", kind]
        ratio = narrow[line]["backward"]["counted_bytes_per_step"] / wide[line]["backward"]["counted_bytes_per_step"]
        assert ratio == pytest.approx(0.5)
        assert 0 < np.abs(full - half).max() < 0.05


def test_resume_without_a_checkpoint_says_how_others_differ(group: Callable[[int], Group], tmp_path: Path) -> None:
    train(group(1), tmp_path, train={"max_steps": 2})
    with pytest.raises(AssertionError, match=r"written for model\.factors=4, the run has 8; set it back"):
        train(group(1), tmp_path, resume=True, model={"factors": 8})
    with pytest.raises(AssertionError, match="no checkpoint of this config and data"):
        train(group(1), tmp_path, resume=True, train={"batch": 50})


def test_neighbours_that_cannot_be_read_are_done_without(group: Callable[[int], Group], tmp_path: Path) -> None:
    """Checkpoints of other runs lie in the same folder; some of them are damaged, half there, or something else."""
    train(group(1), tmp_path, train={"max_steps": 2})
    folder = tmp_path / "checkpoints"
    for name, text in (("aaa", "no JSON"), ("bbb", '{"checkpoint": "x"}'), ("ccc", '{"other": 1}'), ("ddd", None)):
        (folder / name).mkdir()
        if text is not None:
            (folder / name / "last.json").write_text(text)
    gone = f"{folder}/eee/step-0000000001/manifest.json#sha256:{'0' * 64}"
    (folder / "eee").mkdir()
    (folder / "eee" / "last.json").write_text(f'{{"checkpoint": "{gone}"}}')
    resumed = train(group(1), tmp_path, resume=True, train={"max_steps": 5})
    assert resumed["step"] == 5


def test_a_damaged_pointer_leads_to_the_newest_manifest(group: Callable[[int], Group], tmp_path: Path) -> None:
    train(group(1), tmp_path, train={"max_steps": 2})
    (pointer,) = (tmp_path / "checkpoints").glob("*/last.json")
    whole = manifests.last(str(pointer.parent))
    pointer.write_text("damaged")
    assert whole is not None and manifests.last(str(pointer.parent)) == whole


def test_a_manifest_waits_for_the_slowest_workers_file(group: Callable[[int], Group], tmp_path: Path) -> None:
    """A file of an earlier attempt lies there; worker 1 replaces it late."""
    config = tiny.config(tmp_path, train={"max_steps": 2, "workers": 2})
    dataset = tiny.store(config)
    arguments = {"config": config.model_dump_json(), "dataset": str(dataset)}
    group(2).do("slow_save", **arguments, seconds=0.7)
    (manifest,) = (tmp_path / "checkpoints").glob("*/*/manifest.json")
    (layer,) = storage.read_json(str(manifest))["layers"]
    written = [storage.digest_file(str(path)) for path in sorted(manifest.parent.glob("blocks-*.json"))]
    assert layer["directories"] == written and len(written) == 2
    assert not list(manifest.parent.glob("saved-*.json"))


def test_half_a_checkpoint_is_never_read(group: Callable[[int], Group], tmp_path: Path) -> None:
    train(group(2), tmp_path, train={"max_steps": 4, "workers": 2})
    (rows,) = (tmp_path / "checkpoints").rglob("weights-00001-000.arrow")
    data = bytearray(rows.read_bytes())
    data[len(data) // 2] ^= 1
    rows.write_bytes(data)
    with pytest.raises(AssertionError, match=r"weights-00001-000\.arrow: the weights of table .* other content than"):
        train(group(2), tmp_path, resume=True, train={"max_steps": 6, "workers": 2})


def test_report_of_a_run(group: Callable[[int], Group], tmp_path: Path) -> None:
    """Evaluation reads the kept weights; every promised number is there."""
    config = tiny.config(tmp_path, train={"epochs": 3, "workers": 3})
    dataset = tiny.store(config)
    arguments = {"config": config.model_dump_json(), "dataset": str(dataset)}
    group(3).do("train", **arguments)
    group(3).do("report", **arguments)
    (folder,) = (tmp_path / "runs").iterdir()
    report = storage.read_json(str(folder / "report.json"))
    promised = "split samples auc logloss ne calibration gauc workers steps samples_per_s peak_rss_mb exchange valid"
    assert all(report[key] is not None for key in promised.split())
    assert report["samples"] == Dataset.load(dataset).rows("test") == 110
    assert report["valid"]["auc"] == pytest.approx(max(entry["auc"] for entry in report["epochs"]), abs=1e-9)
    assert sum(b["samples"] for b in report["calibration_bins"]) == 110
    assert report["table"][-1]["rows"] > 100


def test_manifest_of_another_shape_is_refused(group: Callable[[int], Group], tmp_path: Path) -> None:
    train(group(1), tmp_path, train={"max_steps": 2})
    (pointer,) = (tmp_path / "checkpoints").glob("*/last.json")
    reference = manifests.last(str(pointer.parent))
    assert reference is not None
    shape = manifests.Manifest.load(reference).shape
    other = shape.model_copy(update={"tables": ("user",)})
    with pytest.raises(CheckpointError, match="written for tables="):
        manifests.read(reference, other)


@pytest.mark.parametrize("name", ["deepfm", "dcn_v2", "autoint"])
def test_products_of_sixteen_bits_are_near_and_the_weights_are_fp32s(
    group: Callable[[int], Group], tmp_path: Path, name: str
) -> None:
    """Logits move by parts in a thousand; rows and checkpoints are those of fp32."""
    answers = {
        precision: train(
            group(2),
            tmp_path / precision,
            model={"name": name, "hidden": [6, 5]},
            train={"precision": precision, "max_steps": 12, "exchange": "gather" if name == "autoint" else "sum"},
            optimizer=ADAM,
        )
        for precision in ("fp32", "bf16", "tf32")
    }
    whole, half = (np.array(answers[precision]["logits"]) for precision in ("fp32", "bf16"))
    assert 0 < np.abs(half - whole).max() < 0.05 * (1 + np.abs(whole).max())
    assert answers["tf32"]["logits"] == answers["fp32"]["logits"], "without a GPU tf32 is fp32"
    again = train(
        group(2),
        tmp_path / "bf16",
        resume=True,
        model={"name": name, "hidden": [6, 5]},
        train={"precision": "bf16", "max_steps": 14, "exchange": "gather" if name == "autoint" else "sum"},
        optimizer=ADAM,
    )
    assert again["step"] == 14
