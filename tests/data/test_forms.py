"""One value, one key: what a field's values are is settled once, and every format is brought to it or refused."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from des_core import storage
from des_core.config import Config, parse_config
from des_core.contracts import GROUP, Dataset, FieldSpec, Part, Reference, RowsFile
from des_core.data.read.forms import form_of_values, in_form
from des_core.data.store.dataset import settled_forms
from des_core.data.store.features import ingest, ingest_days
from des_core.data.store.parts import PartManifest
from des_core.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ([], ""),
        ([None, None], ""),
        (["ann", "7"], "text"),
        (["007", "012"], "text"),
        (["1.1", "1.10", "1.2"], "text"),
        (["7", "8", None], "whole"),
        (["7.0", "8.0"], "whole"),
        (["7", "8.0"], "whole"),
        ([7, None], "whole"),
        ([7.0, float("nan")], "whole"),
        (["7.5", "8.0"], "number"),
        (["7.50", "8.25"], "number"),
        ([7.5, 8.0], "number"),
        (["1e-05", "0.25"], "number"),
        (["True", "False"], "boolean"),
        (["true"], "boolean"),
        ([True, None], "boolean"),
        (["True", "yes"], "text"),
        (["nan", "1.0"], "text"),
        (["", "7"], "text"),
        (["-3", "-4.0"], "whole"),
        ([datetime.date(2026, 1, 1)], "text"),
    ],
)
def test_the_first_values_settle_the_form(values: list[Any], form: str) -> None:
    assert form_of_values(pa.array(values)) == form
    if values and isinstance(values[0], str):
        assert form_of_values(pa.array(values).dictionary_encode()) == form


@pytest.mark.parametrize(
    ("form", "values", "texts"),
    [
        ("text", ["007", "7.0", "True", None], ["007", "7.0", "True", None]),
        ("text", [7, None], ["7", None]),
        ("whole", ["7.0", "7", "007", "x", "7.5", None, "1e3"], ["7", "7", "007", "x", "7.5", None, "1000"]),
        ("whole", [7.0, float("nan")], ["7", None]),
        ("whole", [7, None], ["7", None]),
        ("number", ["7.50", "7.5", "7.0", "x"], ["7.5", "7.5", "7", "x"]),
        ("number", [7.5, 7.0], ["7.5", "7"]),
        ("boolean", ["True", "TRUE", "true", "1", "0.0", "maybe"], ["true", "true", "true", "true", "false", "maybe"]),
        ("boolean", [True, False, None], ["true", "false", None]),
        ("boolean", [1, 0, 2], ["true", "false", "2"]),
        ("boolean", [1.0, 0.0], ["true", "false"]),
    ],
)
def test_values_are_brought_to_their_form(form: Any, values: list[Any], texts: list[Any]) -> None:
    assert in_form(pa.array(values), form).to_pylist() == texts
    if isinstance(values[0], str):
        assert in_form(pa.array(values).dictionary_encode(), form).to_pylist() == texts


@pytest.mark.parametrize(
    ("form", "values", "message"),
    [
        ("text", [7.0], "its values are texts, and a column of type double does not say how they are written"),
        ("text", [True], "its values are texts, and a column of type bool"),
        ("whole", [True], r"its values are numbers \(whole\), and a column of type bool holds none; give numbers"),
        ("number", [False], r"its values are numbers \(number\)"),
        ("whole", [2.0**60], "cannot hold 1152921504606846976 exactly; give whole numbers or text"),
    ],
)
def test_a_typed_column_that_cannot_be_brought_there_is_refused(form: Any, values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        in_form(pa.array(values), form)


def test_a_typed_column_without_values_fits_every_form() -> None:
    for form in ("text", "whole", "number", "boolean"):
        for kind in (pa.bool_(), pa.float64(), pa.null()):
            assert in_form(pa.nulls(2, kind), form).to_pylist() == [None, None]  # type: ignore[arg-type]


def by_day(tmp_path: Path, fields: list[dict[str, Any]], **source: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "r"},
            "source": {"path": str(tmp_path / "{day}.*"), "time": "t", "group": "user", **source},
            "fields": fields,
            "storage": {"root": str(tmp_path / "root")},
        }
    )


FIELDS = [{"name": "user"}, {"name": "code"}, {"name": "flag"}, {"name": "ids", "kind": "multi"}]


def frame(day: int) -> pd.DataFrame:
    """Rows of a day; missing users make pandas write the others as 7.0."""
    return pd.DataFrame(
        {
            "user": [7, 8, None, 9],
            "code": ["007", "010", "007", "1.10"],
            "flag": [True, False, True, True],
            "ids": ["1.0|2.0", "2", "3", ""],
            "label": [1, 0, 1, 0],
            "t": [f"2026-01-0{day}T0{n}:00:00" for n in range(4)],
        }
    )


def keys_of(root: str, part: PartManifest) -> dict[str, list[Any]]:
    table = pq.read_table(storage.join(root, part.part.files[0].path)).sort_by("_time")
    return {name: table.column(name).to_pylist() for name in ("user", "code", "flag", "ids", GROUP)}


def test_a_csv_day_and_a_parquet_day_have_the_same_keys(tmp_path: Path) -> None:
    frame(1).to_csv(tmp_path / "2026-01-01.csv", index=False)
    typed = frame(2).astype({"user": "Int64"})
    table = pa.Table.from_pandas(typed, preserve_index=False)
    assert table.schema.field("user").type == pa.int64() and table.schema.field("flag").type == pa.bool_()
    pq.write_table(table, tmp_path / "2026-01-02.parquet")
    config = by_day(tmp_path, FIELDS)
    made = ingest_days(config, {"2026-01-01": [f"{tmp_path}/2026-01-01.csv"]})
    forms = made["2026-01-01"].forms
    assert forms == {"user": "whole", "code": "text", "flag": "boolean", "ids": "whole", GROUP: "whole"}
    # Another source.format makes another store, in which nothing is settled yet: its config says what is.
    declared = [field | {"form": forms[field["name"]]} for field in FIELDS]
    parquet = by_day(tmp_path, declared, format="parquet")
    typed_made = ingest_days(parquet, {"2026-01-02": [f"{tmp_path}/2026-01-02.parquet"]})
    first = keys_of(config.features_root, made["2026-01-01"])
    second = keys_of(parquet.features_root, typed_made["2026-01-02"])
    assert first == second


def test_later_days_keep_the_form_that_the_first_one_settled(tmp_path: Path) -> None:
    frame(1).to_csv(tmp_path / "2026-01-01.csv", index=False)
    later = frame(2)
    later["user"] = ["7", "8.0", "x9", "007"]
    later["flag"] = [1, 0, 1, 1]
    later.to_csv(tmp_path / "2026-01-02.csv", index=False)
    config = by_day(tmp_path, FIELDS)
    files = {day: [f"{tmp_path}/{day}.csv"] for day in ("2026-01-01", "2026-01-02")}
    first = ingest_days(config, {"2026-01-01": files["2026-01-01"]})
    both = ingest_days(config, files)
    assert both["2026-01-01"] == first["2026-01-01"]
    assert both["2026-01-02"].forms == first["2026-01-01"].forms
    old, new = (keys_of(config.features_root, both[day]) for day in sorted(both))
    assert new["user"][:2] == old["user"][:2] and new["user"][3] not in old["user"]
    assert new["flag"] == old["flag"]


def test_the_model_learns_the_forms_from_the_store(tmp_path: Path) -> None:
    frame(1).to_csv(tmp_path / "2026-01-01.csv", index=False)
    config = by_day(tmp_path, FIELDS)
    split = config.split.model_copy(update={"by": "random", "valid": 0.25, "test": 0.25})
    reference = ingest(config.model_copy(update={"split": split}))
    fields = {field.name: field.form for field in Dataset.load(reference).fields}
    assert fields == {"user": "whole", "code": "text", "flag": "boolean", "ids": "whole"}


def test_one_name_with_two_forms_is_refused_with_what_to_set() -> None:
    def part(name: str, form: str) -> PartManifest:
        made = Part(files=(RowsFile(path=f"{name}/rows.parquet", sha256="0", rows=1),))
        return PartManifest(spec="s", sources=(), files=1, part=made, forms={"user": form}, texts={})  # type: ignore[dict-item]

    assert settled_forms([part("a", ""), part("b", "whole")]) == {"user": "whole"}
    with pytest.raises(DataError, match=r"field user: its values are text in part b/rows.parquet and whole in part a/"):
        settled_forms([part("a", "whole"), part("b", "text")])
    known = FieldSpec(name="user", column="user", kind="categorical", table="user", form="text")
    with pytest.raises(DataError, match=r"text in the model that training goes on from; set form = 'text'"):
        settled_forms([part("a", "whole")], [known])


@pytest.mark.parametrize("side", ["csv", "parquet"])
def test_a_side_table_is_joined_by_value_whatever_wrote_it(tmp_path: Path, side: str) -> None:
    log = pd.DataFrame({"item": [7, 8, None], "label": [1, 0, 1]})
    log.to_csv(tmp_path / "log.csv", index=False)
    items = pd.DataFrame({"item": pd.array([7, 8], "Int64"), "brand": ["acme", "bolt"]})
    place = tmp_path / f"items.{side}"
    items.to_csv(place, index=False) if side == "csv" else items.to_parquet(place)
    config = parse_config(
        {
            "run": {"name": "r"},
            "source": {"path": str(tmp_path / "log.csv"), "join": [{"path": str(place), "on": "item"}]},
            "fields": [{"name": "brand"}],
            "split": {"by": "random", "valid": 0.34, "test": 0.34},
            "storage": {"root": str(tmp_path / "root")},
        }
    )
    reference: Reference = ingest(config)
    dataset = Dataset.load(reference)
    keys = pq.read_table(storage.join(reference.uri.rpartition("/")[0], dataset.parts["all"].files[0].path)).column(
        "brand"
    )
    assert len(set(keys.to_pylist())) == 3, "acme, bolt, missing"


def test_a_number_has_no_form_to_declare(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="form is for values that own rows; a numeric field's are numbers already"):
        by_day(tmp_path, [{"name": "user"}, {"name": "price", "kind": "numeric", "form": "whole"}])
