"""What crosses from one stage to the next: references, the feature store's schema and manifests.

A stage hands on a ``Reference``: the address of a manifest and the sha256 of its bytes. Whoever reads
the manifest checks the digest, and the manifest names every other file with its own digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from des_core import storage
from des_core.errors import DamagedError, StorageError

ROW_GROUP = 65_536
"""Rows of a row group of the feature store: fixed, whatever the batch."""

LABEL, TIME, GROUP, FILE, ROW = "_label", "_time", "_group", "_file", "_row"
"""Columns of the feature store beside the fields: float32 label, int64 event time in microseconds since
1970 UTC (null where the log has none), int64 key of the group, int32 position in ``Dataset.files`` counted from
the part's ``first_file``, int64 row in that file."""

DAY_MICROS = 86_400_000_000
"""Microseconds of a day."""

Form = Literal["", "text", "whole", "number", "boolean"]
"""What the values of a field are (data/forms.py); empty: not settled, for none has been seen."""

WEIGHT = "weight:"
"""Prefix of the column with a field's weights: float32, or list<float32> for a multi field."""


PHASES = {
    "read": "the next batch's columns from the feature store",
    "decode": "columns to lookups: hashes, weights, owners",
    "index": "unique ids, their slots, admission",
    "stall": "training waited for the next batch",
    "gather": "unique rows from the table",
    "partial": "partial results of what is owned here",
    "exchange": "inside collectives, both ways",
    "head": "totals to loss",
    "backward": "loss to gradients of rows",
    "update": "optimizer, rows and dense weights",
}
"""Phases of a training step, and what happens in each."""

PREFETCH = ("read", "decode", "index")
"""Phases that run under the others, in the prefetch thread."""


@dataclass(frozen=True)
class Reference:
    """A manifest's address and sha256, passed between steps as ``URI#sha256:HEX``."""

    uri: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.uri}#sha256:{self.sha256}"

    @classmethod
    def parse(cls, text: str) -> Reference:
        uri, mark, sha256 = text.rpartition("#sha256:")
        if not mark or len(sha256) != 64:
            raise StorageError(f"{text!r} is not a reference; write it as URI#sha256:HEX")
        return cls(uri, sha256)

    def read(self) -> Any:
        """The manifest's JSON, checked against the digest."""
        return storage.read_json(self.uri, self.sha256)


class Record(BaseModel):
    """A frozen record that is stored as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def written_sha256(self) -> str:
        """sha256 of the bytes that ``write`` writes."""
        return hashlib.sha256(storage.json_bytes(self.model_dump(mode="json"))).hexdigest()

    def write(self, uri: str) -> Reference:
        """Write this record atomically."""
        return Reference(uri, storage.write_json(uri, self.model_dump(mode="json")))

    @classmethod
    def load(cls, reference: Reference) -> Self:
        """Read and check a record.

        Raises:
            StorageError: missing, changed, or of another form.
        """
        return cls._checked(reference.uri, reference.read())

    @classmethod
    def read(cls, uri: str) -> Self:
        """A record that is stored without a digest of its own.

        Raises:
            StorageError: missing, damaged, or of another form.
        """
        return cls._checked(uri, storage.read_json(uri))

    @classmethod
    def _checked(cls, uri: str, document: Any) -> Self:
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            why = f"{where}: {first['msg']}" if where else first["msg"]
            raise DamagedError(f"{uri} is not a {cls.__name__} of this version ({why})") from None


class FieldSpec(Record):
    """One field as the model sees it: its config resolved, its numeric statistics frozen.

    Stored in the data manifest and in the model, and read by training and serving alike.
    Columns in the feature store, all named as the field: ``categorical`` and bucketed numbers are
    keys too, but numbers are stored raw (float32, null = missing) and transformed when read.
    """

    name: str
    column: str
    kind: Literal["categorical", "multi", "numeric"]
    separator: str = "|"
    weight: str = ""
    pooling: Literal["sum", "mean", "sqrtn"] = "sum"
    transform: Literal["", "log1p", "standard", "bucket"] = ""
    derive: str = ""
    table: str
    mean: float = 0.0
    std: float = 1.0
    edges: tuple[float, ...] = ()
    form: Form = ""
    """Of a categorical or multi field."""
    cross: tuple[str, ...] = ()
    """Fields whose combination this one is; it has no column of its own then."""
    wide: bool = False
    """Whether only the linear part reads it."""
    input: Literal["rows", "dense"] = "rows"


def read_as(fields: Iterable[FieldSpec], input_: str) -> tuple[FieldSpec, ...]:
    """Those fields whose ``input`` it is, in order, wide ones last."""
    return tuple(sorted((field for field in fields if field.input == input_), key=lambda field: field.wide))


def deep_names(fields: Iterable[FieldSpec]) -> list[str]:
    """Names of the fields whose vectors the model reads, F: those with rows, in their order, but for wide ones."""
    return [field.name for field in read_as(fields, "rows") if not field.wide]


class FieldStats(Record):
    """What placement and reports know of a field, over the train part."""

    lookups_per_sample: float
    missing_share: float
    cardinality: int
    """Distinct keys: exact up to 2^16, above it a HyperLogLog estimate (about 1 % error)."""
    top: tuple[tuple[int, int, str], ...] = ()
    """Most frequent values, most frequent first: key, count, value as text."""


class Segment(Record):
    """Rows ``start`` to ``stop`` of one part."""

    part: str
    start: int
    stop: int


class _Placed(Record):
    """A record with paths relative to the folder of the dataset's manifest."""

    @field_validator("path", "quarantine", check_fields=False)
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if path.startswith("/") or "\\" in path or "://" in path or ".." in path.split("/"):
            raise ValueError(f"{path!r} leads out of the feature store")
        return path


class RowsFile(_Placed):
    """One Parquet file of the feature store: ``rows`` rows of a part."""

    path: str
    sha256: str
    footer: str = ""
    """sha256 of the Parquet footer, which says where and how the rows lie; pages have checksums of their own."""
    rows: int


class Part(_Placed):
    """Rows in one order, as Parquet files one after the other; all but the last hold whole row groups."""

    files: tuple[RowsFile, ...]
    bad_rows: int = 0
    quarantine: str = ""
    """Relative path of the bad rows' file, or empty."""
    first_file: int = 0
    """Where this part's raw files begin in ``Dataset.files``."""

    @property
    def rows(self) -> int:
        """Of all files."""
        return sum(file.rows for file in self.files)

    @property
    def sha256(self) -> str:
        """Of the files' digests."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()


class Dataset(Record):
    """The feature store's manifest, ``features/SPEC/manifest.json``: written last, read first."""

    format: Literal[2] = 2
    spec: str
    """``Config.features_digest`` of the config that made it."""
    task: Literal["click", "rating"]
    fields: tuple[FieldSpec, ...]
    has_group: bool
    has_time: bool
    parts: dict[str, Part]
    splits: dict[str, tuple[Segment, ...]]
    """train, valid and test, each a run of segments in order."""
    files: tuple[str, ...]
    """Digests of the raw files, 16 hex digits of their sha256: ``_file`` points here."""
    stats: dict[str, FieldStats]

    @property
    def row_fields(self) -> tuple[FieldSpec, ...]:
        """Fields whose values own rows, F."""
        return read_as(self.fields, "rows")

    @property
    def dense_fields(self) -> tuple[FieldSpec, ...]:
        """Numeric fields that go into the dense layers as they are, M."""
        return read_as(self.fields, "dense")

    def rows(self, split: str) -> int:
        """Samples of a split."""
        return sum(segment.stop - segment.start for segment in self.splits[split])
