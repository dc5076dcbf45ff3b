"""Which files a path means: one file, a glob, a folder, a list of these, and {day} in any of them.

Folders give the data files directly in them and in their folders that are named like dt=2026-01-31, in the order of
their paths, without hidden ones. Such a name gives its files a column: dt.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from datetime import date
from fnmatch import fnmatchcase
from urllib.parse import unquote

from pyarrow import fs as pafs

from des_core import remote, storage
from des_core.errors import DataError, NoLogsError

DAY = "{day}"

_DATE_GLOB = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]"
_DATE = r"(\d{4}-\d\d-\d\d)"
_ENDINGS = {
    "csv": (".csv", ".tsv", ".txt", ".dat", ".log"),
    "criteo": (".tsv", ".txt", ".csv", ".log"),
    "libsvm": (".libsvm", ".libfm", ".svm", ".txt", ".dat"),
    "parquet": (".parquet", ".parq", ".pq"),
}


def as_list(paths: str | Sequence[str]) -> list[str]:
    """A path or several, as a list."""
    return [paths] if isinstance(paths, str) else list(paths)


def files_of(paths: str | Sequence[str], form: str) -> list[str]:
    """Every file that ``paths`` match, each once, in order; {day} matches any date.

    Raises:
        DataError: a path means no file.
    """
    found: dict[str, None] = {}
    for path in as_list(paths):
        files = _expand(path, form)
        if not files:
            raise _nothing(path, form)
        found.update(dict.fromkeys(files))
    return list(found)


def days_of_paths(paths: str | Sequence[str], form: str) -> dict[str, list[str]]:
    """Day -> files, days ascending; every path holds {day}.

    Raises:
        DataError: a path means no file or holds no {day}.
    """
    days: dict[str, list[str]] = {}
    for path in as_list(paths):
        if DAY not in path:
            raise DataError(f"source.path: {path} has no {DAY} but others have; give it to all or to none")
        files = _expand(path, form)
        if not files:
            raise _nothing(path, form)
        for file in files:
            listed = days.setdefault(_day_in(file, path), [])
            if file not in listed:
                listed.append(file)
    return dict(sorted(days.items()))


def digest_of(path: str) -> str:
    """The sha256 of a file's stored bytes, compressed or not.

    Raises:
        DataError: it cannot be read.
    """
    filesystem, inner = storage.resolve(path)
    digest = hashlib.sha256()
    try:
        with filesystem.open_input_stream(inner, compression=None) as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct the path") from None
    except OSError as error:
        remote.raise_passing(path, error)
        raise DataError(f"{path}: cannot be read ({error})") from None
    return digest.hexdigest()


def _nothing(path: str, form: str) -> DataError:
    if _kind(path) == pafs.FileType.Directory:
        ends = ", ".join(_ENDINGS[form])
        return DataError(f"{path}: no data files in this folder (endings: {ends}, or none); correct the path")
    if DAY in path:
        return NoLogsError(f"{path}: no files for any date; {DAY} stands for dates like 2026-01-31")
    return DataError(f"{path}: no such file; correct the path")


def _kind(path: str) -> pafs.FileType:
    filesystem, inner = storage.resolve(path)
    return filesystem.get_file_info(inner).type


def _expand(path: str, form: str) -> list[str]:
    """Files of one path, by name."""
    if _kind(path) == pafs.FileType.NotFound:
        scheme, mark, rest = path.rpartition("://")
        first, *globs = rest.replace(DAY, _DATE_GLOB).split("/")
        matches = sorted(_match(scheme + mark, first, globs))
    else:
        matches = [path]
    files: list[str] = []
    for match in matches:
        kind = _kind(match)
        if kind == pafs.FileType.Directory:
            files += _data_under(match, form)
        elif kind == pafs.FileType.File:
            files.append(match)
    return [file for file in files if _day_in(file, path)] if DAY in path else files


def _match(scheme: str, base: str, globs: list[str]) -> Iterator[str]:
    """Paths under ``base`` whose parts match ``globs``, one by one; ** is any number of folders."""
    if not globs:
        yield scheme + base
        return
    first, rest = globs[0], globs[1:]
    # A folder may have a bracket in its name.
    if not re.search(r"[*?\[]", first) or _kind(f"{scheme}{base}/{first}") != pafs.FileType.NotFound:
        yield from _match(scheme, f"{base}/{first}", rest)
        return
    if first == "**":
        yield from _match(scheme, base, rest)
    folder = f"{scheme}{base}/"
    if _kind(folder) != pafs.FileType.Directory:
        return
    for name in storage.list_folder(folder):
        inner = f"{base}/{name}"
        if first == "**":
            if _kind(scheme + inner) == pafs.FileType.Directory:
                yield from _match(scheme, inner, globs)
        elif fnmatchcase(name, first) and (not name.startswith((".", "_")) or first[0] == name[0]):
            yield from _match(scheme, inner, rest)


def columns_of_path(path: str) -> dict[str, str | None]:
    """Column -> value by the folders of a file that are named like dt=2026-01-31, as Hive and Spark name them."""
    pairs = [part.partition("=") for part in path.split("/")[:-1]]
    named = {name: unquote(value) for name, mark, value in pairs if mark and name}
    return {name: None if value == "__HIVE_DEFAULT_PARTITION__" else value for name, value in named.items()}


def _data_under(folder: str, form: str) -> list[str]:
    """The data files of a folder and of the folders in it that are named like columns."""
    found = []
    for name in storage.list_folder(folder):
        inner = storage.join(folder, name)
        if name.startswith((".", "_")):
            continue
        kind = _kind(inner)
        if kind == pafs.FileType.Directory and "=" in name:
            found += _data_under(inner, form)
        elif kind == pafs.FileType.File and _is_data(name, form):
            found.append(inner)
    return found


def _is_data(name: str, form: str) -> bool:
    bare = re.sub(r"\.(gz|zst|bz2)$", "", name.lower())
    return "." not in bare or bare.endswith(_ENDINGS[form])


def _day_in(file: str, path: str) -> str:
    """The date in ``file`` where ``path`` has {day}; empty if there is none, or two differ."""
    pattern = "".join(_DATE if piece == DAY else _as_regex(piece) for piece in re.split(r"(\{day\})", path))
    found = re.match(pattern, file)
    dates = set(found.groups()) if found else set()
    if len(dates) != 1:
        return ""
    day: str = dates.pop()
    try:
        date.fromisoformat(day)
    except ValueError:
        return ""
    return day


def _as_regex(glob: str) -> str:
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def translate(found: re.Match[str]) -> str:
        token = found[0]
        if len(token) > 2 and token[0] == "[":
            return f"(?:{token.replace('[!', '[^', 1)}|{re.escape(token)})"
        return pieces.get(token, re.escape(token))

    return re.sub(r"\*\*/|\*\*|\[!?[^\]]+\]|.", translate, glob)
