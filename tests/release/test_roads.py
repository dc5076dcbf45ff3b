"""The same rows by every road to a model: files, requests, frames and MLflow's own server score them alike."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

from benchmarks import handmade
from des_core.config import Config, parse_config
from des_core.contracts import Dataset
from des_core.data.feed.batches import ids_of
from des_core.data.read.hashing import combined_keys, hash_values
from des_core.data.store.features import ingest
from des_core.engine.models import build
from des_core.errors import DataError
from des_core.release.registry import registration
from des_core.release.serve import prediction, pyfunc, server, serving
from des_core.run import Run
from tests.finished import finished_run
from tests.release.test_registry import ACCEPT

VALUES = {"user": ["7", "8", "9"], "code": ["007", "010"], "flag": ["true", "false"], "ids": ["1", "2"]}
"""Field -> the texts that stand for its values."""

COLUMNS = {
    "user": [7, 8, None, 9],
    "code": ["007", "010", None, "007"],
    "flag": [True, False, True, None],
    "ids": ["1|2", "2", None, "1"],
    "price": [7.5, 8.0, None, 0.25],
}
RECORDS = [dict(zip(COLUMNS, values, strict=True)) for values in zip(*COLUMNS.values(), strict=True)]


def config_of(folder: Path) -> Config:
    fields = [{"name": name} for name in ("user", "code", "flag")]
    fields += [{"name": "ids", "kind": "multi"}, {"name": "price", "kind": "numeric"}]
    fields += [{"name": "user_code", "cross": ["user", "code"]}]
    return parse_config(
        {
            "run": {"name": "roads", "dir": str(folder)},
            "source": {"path": str(folder / "logs.csv")},
            "fields": fields,
            "split": {"by": "random", "valid": 0.25, "test": 0.25},
            "model": {"name": "fm", "factors": 4},
            "storage": {"root": str(folder)},
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose fields were settled by a log that pandas wrote: 7.0 for a user, True for a flag, 007 for a code."""
    folder = tmp_path_factory.mktemp("roads")
    frame = pd.DataFrame(COLUMNS | {"label": [1, 0, 1, 0]})
    frame.to_csv(folder / "logs.csv", index=False)
    assert "7.0,007,True" in (folder / "logs.csv").read_text()
    config = config_of(folder)
    fields = Dataset.load(ingest(config)).fields
    assert {field.name: field.form for field in fields if field.kind != "numeric" and not field.cross} == {
        "user": "whole",
        "code": "text",
        "flag": "boolean",
        "ids": "whole",
    }
    random = np.random.default_rng(1)
    ids = {name: ids_of(hash_values(pa.array(texts)), name) for name, texts in VALUES.items()}
    pairs = [hash_values(pa.array(texts)) for texts in (["7", "8", "9"], ["007", "010", "007"])]
    ids["user_code"] = ids_of(combined_keys(pairs), "user_code")
    network = build(config.model, [field.name for field in fields], 0, 1)
    place = str(folder / "model")
    rows = {name: random.normal(0, 0.5, (len(ids[name]), network.row_width)).astype(np.float32) for name in ids}
    handmade.describe(
        place, "0" * 64, config, fields, handmade.checkpoint(place, "by-hand", 1, fields, ids, rows, network)
    )
    return place


@pytest.fixture(scope="module")
def expected(model: str) -> np.ndarray[Any, Any]:
    """Scores of the texts that stand for the values, all of which the model knows."""
    scorer = serving.Scorer(model)
    records = pa.table(
        {
            "user": ["7", "8", None, "9"],
            "code": ["007", "010", None, "007"],
            "flag": ["true", "false", "true", None],
            "ids": ["1|2", "2", None, "1"],
            "price": ["7.5", "8", None, "0.25"],
        }
    )
    scored = scorer.scored(records)
    named = dict(zip(scorer.names, scored.unknown_O.tolist(), strict=True))
    assert {name: named[name] for name in VALUES} == dict.fromkeys(VALUES, 1), "all but the missing one have rows"
    assert len(set(scored.scores_B.tolist())) == 4
    return scored.scores_B


def files(folder: Path) -> dict[str, tuple[Path, str]]:
    """The rows as files that other programs write, and source.format of each."""
    frame, typed = pd.DataFrame(COLUMNS), pd.DataFrame(COLUMNS).astype({"user": "Int64", "flag": "boolean"})
    made = {name: folder / name for name in ("pandas.csv", "typed.csv", "arrow.csv", "arrow.parquet", "pandas.parquet")}
    frame.to_csv(made["pandas.csv"], index=False)
    typed.to_csv(made["typed.csv"], index=False)
    table = pa.Table.from_pylist(RECORDS)
    pcsv.write_csv(table, made["arrow.csv"])
    pq.write_table(table, made["arrow.parquet"])
    frame.to_parquet(made["pandas.parquet"])
    return {name: (path, path.suffix[1:]) for name, path in made.items()}


@pytest.mark.parametrize("name", ["pandas.csv", "typed.csv", "arrow.csv", "arrow.parquet", "pandas.parquet"])
def test_files_of_every_writer(model: str, expected: Any, tmp_path: Path, name: str) -> None:
    path, form = files(tmp_path)[name]
    config = config_of(tmp_path)
    config = config.model_copy(update={"source": config.source.model_copy(update={"format": form})})
    done = prediction.predict(model, str(path), str(tmp_path / "scores.csv"), config)
    assert (done.rows, done.bad) == (4, 0)
    found = pd.read_csv(tmp_path / "scores.csv")["probability"]
    np.testing.assert_array_equal(found, expected)


BODIES = {
    "records": json.dumps({"dataframe_records": RECORDS}),
    "split": json.dumps({"dataframe_split": {"columns": list(COLUMNS), "data": [list(r.values()) for r in RECORDS]}}),
    "inputs": json.dumps({"inputs": COLUMNS}),
    "floats": json.dumps({"inputs": COLUMNS | {"user": [7.0, 8.0, None, 9.0]}}),
    "texts": json.dumps(
        {"inputs": COLUMNS | {"user": ["7", "8.0", None, "9"], "flag": ["True", "FALSE", "true", None]}}
    ),
    "mixed": json.dumps({"inputs": COLUMNS | {"user": [7, "8", None, 9.0], "price": [7.5, "8.0", None, 0.25]}}),
    "lists": json.dumps({"inputs": COLUMNS | {"ids": [[1, 2], [2.0], None, ["1"]]}}),
    "csv": pd.DataFrame(COLUMNS).to_csv(index=False),
}


@pytest.mark.parametrize("name", BODIES)
def test_requests_of_every_form(model: str, expected: Any, tmp_path: Path, name: str) -> None:
    loaded = server.Loaded("1", model, str(tmp_path))
    scored = loaded.score(BODIES[name].encode(), "text/csv" if name == "csv" else "application/json")
    np.testing.assert_array_equal(scored.scores_B, expected)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame(COLUMNS),
        pd.DataFrame(COLUMNS).astype({"user": "Int64", "flag": "boolean", "code": "category"}),
        pd.DataFrame(COLUMNS | {"user": [7, "8", None, 9.0]}),
        pd.DataFrame(COLUMNS | {"ids": [[1, 2], [2], None, ["1"]]}),
        COLUMNS,
        {name: np.array(values, dtype=object) for name, values in COLUMNS.items()},
        RECORDS,
    ],
    ids=["frame", "typed", "mixed", "lists", "columns", "arrays", "records"],
)
def test_frames_columns_and_records(model: str, expected: Any, frame: Any) -> None:
    np.testing.assert_array_equal(pyfunc._load_pyfunc(model).predict(frame), expected)


def test_one_record_as_mlflow_takes_it_apart(model: str, expected: Any) -> None:
    record = {name: np.array(value) for name, value in RECORDS[0].items()}
    assert pyfunc._load_pyfunc(model).predict(record).tolist() == expected[:1].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": [7, 10, None, 7]}, "column code: its values are texts, and a column of type double does not say"),
        (
            {"code": [7, 10, 7, 7]},
            r"column 'code': .* lost what leading zeros there were; read it with dtype=\{'code': str\}",
        ),
        ({"user": [True, False, True, None]}, "column user: its values are numbers"),
    ],
)
def test_what_cannot_be_brought_to_its_form_is_refused(model: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pyfunc._load_pyfunc(model).predict(pd.DataFrame(COLUMNS | change))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 2)), "give records with column names"),
        ([[1, 2]], "give records with column names"),
        ({name: values[: 2 + (name == "user")] for name, values in COLUMNS.items()}, "the columns differ in length"),
        (pd.DataFrame([[1, 2]], columns=["user", "user"]), "two columns are named 'user'"),
        ({"user": ["7"]}, "the records have no column 'code'"),
    ],
)
def test_what_is_no_records_is_refused(model: str, given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pyfunc._load_pyfunc(model).predict(given)


def test_mlflows_own_server_scores_every_form_it_takes(model: str, expected: Any, tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow
        from mlflow.pyfunc.scoring_server import invocations

        example = pa.table({name: pa.array(values) for name, values in COLUMNS.items()})

        def described(_: Run, folder: str) -> pa.Table:
            shutil.copytree(model, folder)
            return example

        registration.register(run, ACCEPT, described)
        mlflow.set_tracking_uri(run.config.registry.tracking_uri)
        loaded = mlflow.pyfunc.load_model("models:/shop/1")
        np.testing.assert_array_equal(loaded.predict(pd.DataFrame(COLUMNS)), expected)
        # MLflow makes arrays of the columns in "inputs", which lists of different lengths are not.
        lists = [record | {"ids": (record["ids"] or "").split("|")} for record in RECORDS]
        for name, body in (BODIES | {"lists": json.dumps({"dataframe_records": lists})}).items():
            kind = "text/csv" if name == "csv" else "application/json"
            if name == "csv":
                # pandas guesses that 007 is a number there: nothing can bring the zeros back.
                with pytest.raises(Exception, match="unexpected error while evaluating the model"):
                    invocations(body.encode(), kind, loaded, None)
                body = body.replace("007", "x007").replace("010", "x010")
            answer = invocations(body.encode() if name == "csv" else body, kind, loaded, None)
            assert answer.status == 200, (name, answer.response)
            scores = json.loads(answer.response)["predictions"]
            if name != "csv":
                assert scores == expected.tolist(), name
            else:
                assert len(scores) == 4


def test_columns_are_kept_beside_the_scores(model: str, expected: Any, tmp_path: Path) -> None:
    frame = pd.DataFrame(COLUMNS | {"note": ['say "a, b"', "", "two\nlines", None]})
    frame.to_csv(tmp_path / "in.csv", index=False)
    config = config_of(tmp_path)
    output = tmp_path / "scores.csv"
    prediction.predict(model, str(tmp_path / "in.csv"), str(output), config, ("user", "note"))
    found = pd.read_csv(output, dtype=str, keep_default_na=False)
    assert list(found) == ["sample", "probability", "user", "note"]
    assert found["user"].tolist() == ["7.0", "8.0", "", "9.0"]
    assert found["note"].tolist() == ['say "a, b"', "", "two\nlines", ""]
    np.testing.assert_array_equal(found["probability"].astype(float), expected)
    with pytest.raises(DataError, match=r"in\.csv: no column 'usr' \(to keep\); did you mean 'user'"):
        prediction.predict(model, str(tmp_path / "in.csv"), str(output), config, ("usr",))
    with pytest.raises(DataError, match="--keep sample: the output has a column of that name already"):
        prediction.predict(model, str(tmp_path / "in.csv"), str(output), config, ("sample",))
