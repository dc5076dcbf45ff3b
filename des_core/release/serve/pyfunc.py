"""What MLflow loads: a registered model behind ``predict``, for its own scoring server and for a notebook.

The model has no input schema: MLflow's would refuse 7 where it was told text, and text where it was told 7, although
a field brings both to its form. So it hands over whatever came: a pandas frame, columns by name, or records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from des_core.errors import DataError
from des_core.release.serve import payload
from des_core.release.serve.serving import Array, Scorer


class PyfuncModel:
    """Raw records in, probabilities out."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        fields = scorer.description.fields
        self._texts = {field.column for field in fields if field.form == "text"}

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Array:
        """Probabilities, float64 [B].

        Args:
            model_input: a pandas frame, a mapping of column to values, or a list of records.

        Raises:
            DataError: as ``Scorer.score``, or the input is none of these.
        """
        return self._scorer.score(self._table(model_input))

    def _table(self, records: Any) -> pa.Table:
        if isinstance(records, list) and all(isinstance(record, Mapping) for record in records):
            records = {name: [record.get(name) for record in records] for name in dict.fromkeys(_names(records))}
        names = list(records) if isinstance(records, Mapping) or hasattr(records, "columns") else None
        if names is None:
            raise DataError("give records with column names: a pandas frame, columns by name, or a list of records")
        wanted = [name for name in names if name in self._scorer.columns]
        twice = sorted({name for name in wanted if wanted.count(name) > 1})
        if twice:
            raise DataError(f"two columns are named {twice[0]!r}")
        columns = {name: self._column(name, records[name]) for name in wanted}
        if len({len(column) for column in columns.values()}) > 1:
            raise DataError("the columns differ in length; give each record a value, or None, in every column")
        return pa.table(columns)

    def _column(self, name: str, values: Any) -> pa.Array:
        """A column's values; what pandas has made of texts is refused, for it cannot be undone."""
        if hasattr(values, "dtype") and hasattr(values, "index"):
            try:
                array = pa.Array.from_pandas(values)
            except (pa.ArrowException, OverflowError):
                return payload.column(name, [_plain(value) for value in values.tolist()])
            if name in self._texts and pa.types.is_integer(array.type) and array.null_count < len(array):
                raise DataError(
                    f"column {name!r}: its values are texts, and the frame holds numbers, which have lost what leading "
                    f"zeros there were; read it with dtype={{{name!r}: str}}"
                )
            return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        if isinstance(values, np.ndarray):
            values = values.tolist()
        if not isinstance(values, list | tuple):
            # One record, as MLflow takes it apart.
            values = [values]
        return payload.column(name, [_plain(value) for value in values])


def _names(records: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for record in records:
        yield from record


def _plain(value: Any) -> Any:
    """A value as Python has it, out of numpy's wrappings."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _load_pyfunc(path: str) -> PyfuncModel:
    """MLflow's entry: the model of a local folder."""
    return PyfuncModel(Scorer(path))
