"""Logs without names lose their label column when there is nothing to learn from them."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from des_core.config import SourceConfig
from des_core.data.read.sources import CRITEO_COLUMNS
from des_core.errors import DataError
from des_core.release.serve import prediction
from des_core.release.serve.prediction import _fitting


def test_criteos_test_logs_have_one_column_less(tmp_path: Path) -> None:
    source = SourceConfig(format="criteo", path="train.txt")
    (tmp_path / "whole.txt").write_text("\t".join(["1"] * 40) + "\n")
    assert _fitting(source, str(tmp_path / "whole.txt")) == source
    with gzip.open(tmp_path / "test.txt.gz", "wt") as file:
        file.write("\t".join(["1"] * 39) + "\n")
    found = _fitting(source, str(tmp_path / "test.txt.gz"))
    assert (found.format, found.delimiter, found.header) == ("csv", "\t", CRITEO_COLUMNS[1:])


@pytest.mark.parametrize(
    ("line", "names"),
    [("1,ann,3", ("click", "user", "price")), ("ann,3", ("user", "price")), ("ann", ("click", "user", "price"))],
)
def test_a_list_of_names_fits_with_and_without_the_label(tmp_path: Path, line: str, names: tuple[str, ...]) -> None:
    source = SourceConfig(path="logs.csv", header=("click", "user", "price"), label="click")
    (tmp_path / "logs.csv").write_text(line + "\n")
    assert _fitting(source, str(tmp_path / "logs.csv")).header == names


def test_a_file_that_names_its_columns_is_left_alone(tmp_path: Path) -> None:
    source = SourceConfig(path="logs.csv")
    (tmp_path / "logs.csv").write_text("user,price\n")
    assert _fitting(source, str(tmp_path / "logs.csv")) == source


@pytest.mark.parametrize("output", ["logs.csv", "./logs.csv", "link.csv", "hard.csv"])
def test_scores_never_replace_the_records_they_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("logs.csv").write_text("click,user\n1,ann\n")
    Path("link.csv").symlink_to("logs.csv")
    os.link("logs.csv", "hard.csv")
    with pytest.raises(DataError, match=rf"--output {output} is the file that is read"):
        prediction.predict("no-model", str(tmp_path / "logs.csv"), output)
    assert Path("logs.csv").read_text() == "click,user\n1,ann\n"
