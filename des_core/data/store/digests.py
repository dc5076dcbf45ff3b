"""sha256 of raw files; a file that has not changed since it was read is not read again.

    ROOT/digests.json    address -> size, time of change in nanoseconds, sha256

A day's run looks at every closed day's logs, and reading weeks of them to learn that nothing has changed would take
longer than the day's own. What was changed just before it was read is not believed: clocks of file systems are coarse.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from pyarrow import fs as pafs

from des_core import storage
from des_core.data.read.paths import digest_of
from des_core.errors import DamagedError

SETTLED_S = 2.0
"""How long before it is read a file must have changed last."""


class Digests:
    """Digests of one storage root's raw files.

    Args:
        root: ``storage.root``.
    """

    def __init__(self, root: str) -> None:
        self._uri = storage.join(root, "digests.json")
        self._known = self._there()
        self._new: dict[str, list[int | str]] = {}

    def of(self, paths: Iterable[str]) -> tuple[str, ...]:
        """The sha256 of each file, in order.

        Raises:
            DataError: one cannot be read.
        """
        return tuple(map(self._one, paths))

    def _one(self, path: str) -> str:
        filesystem, inner = storage.resolve(path)
        info: pafs.FileInfo = filesystem.get_file_info(inner)
        size, changed = info.size, info.mtime_ns
        known = self._known.get(path)
        if known is not None and known[:2] == [size, changed]:
            return str(known[2])
        now = time.time_ns()
        sha256 = digest_of(path)
        if size is not None and changed is not None and now - changed > SETTLED_S * 1e9:
            self._known[path] = self._new[path] = [size, changed, sha256]
        return sha256

    def keep(self) -> None:
        """Write down what is new, so that it need not be read again."""
        if self._new:
            # Another process may have learned of other files meanwhile.
            storage.write_json(self._uri, self._there() | self._new)
            self._new = {}

    def _there(self) -> dict[str, list[int | str]]:
        """What is written down; nothing of a damaged file, for all of it can be found out again."""
        try:
            found = storage.read_json(self._uri) if storage.exists(self._uri) else {}
        except DamagedError:
            return {}
        return {path: known for path, known in found.items() if isinstance(known, list) and len(known) == 3}
