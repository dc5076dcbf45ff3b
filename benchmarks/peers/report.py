"""What people read: a table per case, and where along an axis the winner changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.peers import comparison
from benchmarks.peers.driver import summary
from benchmarks.peers.links import RATES

LOOPBACK_MBPS = 100_000.0
"""Where loopback stands on an axis of links."""

AXES = ("link", "hidden", "factors", "fields", "table_rows", "bag", "zipf", "batch", "workers")
COLUMNS = (
    "system",
    "gate",
    "samples/s",
    "DES is faster by",
    "cpu ms/sample",
    "DES's cpu by theirs",
    "MB/step counted",
    "computed",
    "least",
    "peak MB",
)


def title(result: Any) -> str:
    """A case in a line."""
    case = result["case"]
    deep = f" hidden={'-'.join(map(str, case['hidden']))}" if case["model"] not in ("lr", "fm") else ""
    return (
        f"{case['model']}{deep} N={case['workers']} link={case['link']} batch={case['batch']} "
        f"fields={case['fields']}x{case['table_rows']} k={case['factors']} bag={case['bag']} zipf={case['zipf']} "
        f"rule={case['rule']}{' all-rows-live' if case['fill'] else ''} "
        f"unique-at-home={result['unique']:.0f} load={result['load']:.1f}"
    )


def table(result: Any) -> str:
    """The case's systems, one a line; bytes are per worker and step, peaks all workers' together."""
    rows = [COLUMNS, *(_cells(line) for line in summary(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )


def crossovers(results: Iterable[Any], peer: str) -> list[str]:
    """A line for each axis along which DES is faster than a peer at one end and slower at the other, or is not."""
    lines = []
    known = [(result["case"], _speed(result, peer)) for result in results]
    for axis in AXES:
        groups: dict[str, dict[float, float]] = {}
        for case, speed in known:
            if speed is not None:
                others = " ".join(f"{key}={value}" for key, value in case.items() if key not in (axis, "batches"))
                groups.setdefault(others, {})[place(axis, case[axis])] = speed
        for others, found in groups.items():
            if len(found) > 1:
                places, speeds = zip(*sorted(found.items()), strict=True)
                at = comparison.crossover(places, speeds)
                ends = ", ".join(f"{x:g}: {speed:.2f}" for x, speed in zip(places, speeds, strict=True))
                verdict = f"even at {axis} = {at:.3g}" if at else f"{'DES' if speeds[0] > 1 else peer} throughout"
                lines.append(f"{axis}: {verdict} ({ends}; {others})")
    return lines


def place(axis: str, value: Any) -> float:
    """A number for a value of an axis; a link's is its Mbit/s, hidden layers' the first one's width."""
    if axis == "link":
        return RATES[value] or LOOPBACK_MBPS
    return float(value[0] if isinstance(value, Sequence) else value)


def _speed(result: Any, peer: str) -> float | None:
    lines = [line for line in summary(result) if line["system"] == peer and line["des_samples_per_s"]]
    return float(lines[0]["des_samples_per_s"]["median"]) if lines else None


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    speed, cpu = (
        line[key] and str(comparison.Ratio(**line[key])) for key in ("des_samples_per_s", "des_cpu_ms_per_sample")
    )
    counted = line["interface_bytes"] if line["interface_bytes"] is not None else line["ledger_bytes"]
    return (
        line["says"],
        f"{line['deviation']:.0e}" if line["equal"] else f"NOT EQUAL {line['deviation']:.0e}",
        f"{line['samples_per_s']:,.0f}",
        speed or "-",
        f"{line['cpu_ms_per_sample']:.4f}",
        cpu or "-",
        _megabytes(counted),
        _megabytes(line["computed_bytes"]),
        _megabytes(line["least_bytes"]),
        f"{line['peak_bytes'] / 1e6:,.0f}",
    )


def _megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.3f}"
