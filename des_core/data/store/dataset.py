"""The dataset's manifest, made from the manifests of its parts, and the files that it no longer needs.

The manifest is written after all parts are whole, and only then do files go that it does not name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from des_core import storage
from des_core.config import Config, SourceConfig
from des_core.contracts import Dataset, FieldSpec, FieldStats, Form, Reference
from des_core.data.store.parts import PartManifest, whole_part
from des_core.data.store.sketches import pieces_of, sketches
from des_core.data.store.splits import Splits, divide
from des_core.data.store.statistics import Sketch, merged, stats_of, with_statistics
from des_core.errors import DamagedError, DataError

_OURS = re.compile(
    r"manifest\.json|rows-\w+\.parquet|quarantine\.csv|sketches-[\d-]+\.arrow|.*\.partial-\d+|incoming-\w+\.parquet"
)


def stored_dataset(root: str) -> Dataset | None:
    """The manifest of the feature store as it is, if there is one of this version."""
    uri = storage.join(root, "manifest.json")
    if not storage.exists(uri):
        return None
    try:
        return Dataset.read(uri)
    except DamagedError:
        return None


def earlier_days(root: str, spec: str) -> dict[str, PartManifest]:
    """Every whole part that a config of digest ``spec`` made."""
    found = {name: whole_part(root, name) for name in storage.list_folder(root) if not name.startswith(".")}
    return {name: part for name, part in found.items() if part is not None and part.spec == spec}


def settled_forms(parts: Iterable[PartManifest], known: Iterable[FieldSpec] = ()) -> dict[str, Form]:
    """Field -> what its values are, in all parts and in the known fields.

    Raises:
        DataError: in one they are something else than in another.
    """
    forms: dict[str, Form] = {}
    where: dict[str, str] = {}
    given = [*(("the model that training goes on from", {field.name: field.form}) for field in known)]
    given += [(f"part {part.part.files[0].path}", part.forms) for part in parts if part.part.files]
    for place, settled in given:
        for name, form in settled.items():
            if not form:
                continue
            if forms.setdefault(name, form) != form:
                raise DataError(
                    f"field {name}: its values are {form} in {place} and {forms[name]} in {where[name]}; "
                    f"set form = {forms[name]!r} for it in [[fields]]"
                )
            where.setdefault(name, place)
    return forms


def write_dataset(
    config: Config,
    source: SourceConfig,
    specs: Sequence[FieldSpec],
    root: str,
    manifests: Mapping[str, PartManifest],
) -> Reference:
    """Write the dataset's manifest over parts, in their order; one that would not change is left alone.

    Raises:
        DataError: a split would be empty.
    """
    known = stored_dataset(root)
    # Days that come later must not change what a number means to the model.
    same = known is not None and known.spec == config.features_digest and _overlap(known, manifests)
    fields = known.fields if known is not None and same else ()
    dataset = dataset_of(config, source, specs, root, manifests, divide(config, manifests), fields)
    uri = storage.join(root, "manifest.json")
    if known == dataset:
        return Reference(uri, hashlib.sha256(storage.read_bytes(uri)).hexdigest())
    return dataset.write(uri)


def dataset_of(
    config: Config,
    source: SourceConfig,
    specs: Sequence[FieldSpec],
    root: str,
    manifests: Mapping[str, PartManifest],
    splits: Splits,
    known: Sequence[FieldSpec] = (),
) -> Dataset:
    """The manifest over parts and their splits.

    Args:
        known: fields whose statistics are settled; the others' come from the train split.
    """
    forms = settled_forms(manifests.values(), known)
    specs = [spec.model_copy(update={"form": spec.form or forms.get(spec.name, "")}) for spec in specs]
    known = [field.model_copy(update={"form": field.form or forms.get(field.name, "")}) for field in known]
    sketched = [
        sketches(root, manifests[segment.part].part, segment.part, specs, segment.start, segment.stop)
        for segment in splits["train"]
    ]
    totals = [merged(spec, column) for spec, column in zip(specs, zip(*sketched, strict=True), strict=True)]
    settled = {field.name: field for field in known}
    fields = tuple(
        settled.get(spec.name) or with_statistics(spec, total) for spec, total in zip(specs, totals, strict=True)
    )
    files, first_files = _files_of(manifests)
    return Dataset(
        spec=config.features_digest,
        task=source.task,
        fields=fields,
        has_group=bool(source.group),
        has_time=bool(source.time),
        parts={
            name: manifest.part.model_copy(update={"first_file": first_files[name]})
            for name, manifest in manifests.items()
        },
        splits=splits,
        files=files,
        stats=_stats(fields, totals, manifests),
    )


def _overlap(known: Dataset, manifests: Mapping[str, PartManifest]) -> bool:
    """Whether a part of the known dataset is still there, unchanged."""
    return any(name in known.parts and known.parts[name].sha256 == part.part.sha256 for name, part in manifests.items())


def _files_of(manifests: Mapping[str, PartManifest]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Digests of all raw files, and where each part's begin; parts of the same files share them."""
    files: list[str] = []
    starts: dict[tuple[str, ...], int] = {}
    first_files: dict[str, int] = {}
    for name, manifest in manifests.items():
        own = manifest.sources[: manifest.files]
        if own not in starts:
            starts[own] = len(files)
            files += [digest[:16] for digest in own]
        first_files[name] = starts[own]
    return tuple(files), first_files


def _stats(
    fields: Sequence[FieldSpec], totals: Sequence[Sketch], manifests: Mapping[str, PartManifest]
) -> dict[str, FieldStats]:
    texts: dict[str, dict[int, str]] = {spec.name: {} for spec in fields}
    for manifest in manifests.values():
        for name, known in manifest.texts.items():
            texts[name] |= dict(known)
    return {spec.name: stats_of(spec, total, texts[spec.name]) for spec, total in zip(fields, totals, strict=True)}


def remove_stale(root: str, dataset: Dataset, everything: bool) -> None:
    """Remove the store's files that its manifest does not name; days of other configs go with ``everything`` else."""
    for name in storage.list_folder(root):
        folder = storage.join(root, name)
        if name in dataset.parts:
            _clean_part(root, name, dataset)
        elif name.startswith(".scratch-") and everything:
            storage.delete(folder)
        elif not name.endswith(".json") and (everything or whole_part(root, name) is not None):
            inside = storage.list_folder(folder)
            if inside and all(_OURS.fullmatch(file) for file in inside):
                storage.delete(folder)


def _clean_part(root: str, name: str, dataset: Dataset) -> None:
    part = dataset.parts[name]
    segments = [segment for segment in dataset.splits["train"] if segment.part == name]
    named = {*(file.path for file in part.files), part.quarantine, f"{name}/manifest.json"}
    for segment in segments:
        for _, first, last in pieces_of(part, segment.start, segment.stop):
            named.add(f"{name}/sketches-{first}-{last}.arrow")
    for file in storage.list_folder(storage.join(root, name)):
        if f"{name}/{file}" not in named and _OURS.fullmatch(file):
            storage.delete(storage.join(root, name, file))
