"""Bytes that one worker sends to others in one step, both ways: what each exchange must send, by its algorithm.

    DES, sum            8 (N-1) b P                          P numbers per sample of a partial result
    DES, gather         8 (N-1)/N b D                        D numbers per sample of pooled vectors
    DES, rows           8 (N-1)/N U K + 4 (N-1)/N b F J      each distinct row once, and a 32-bit place per lookup
    TorchRec table-wise (N-1)/N b F (8 K + T (8 J + 4))      pooled rows and their gradients; ids and lengths, T tables
    TorchRec row-wise   12 (N-1) b F K + ids                 reduce-scatter on gloo is an all-reduce inside
               ideally   8 (N-1) b F K + ids                 ids = (N-1)/N b F T 8 J + (N-1) b F T 4
    parameter server    2 (N-1)/N U (4 K + 8)                each distinct row once, with its id, to and fro
    DDP sparse          (N-1) U (4 K + 8)                    everybody's gradients to everybody, around a ring
    dense gradients     8 (N-1)/N n                          n dense weights, an all-reduce; in all of them

TorchRec's tables keep w and v apart where they have accumulators of their own (T = 2), and pad rows to a multiple of
four. ``least_table_wise`` is table-wise sharding without either: one table, no padding, ids once.

Dims: N workers, b samples of a home slice, F fields, J lookups per field and sample, K numbers per row, U distinct rows
of a home slice. Numbers have 4 bytes, ids 8, lengths 4.
"""

from __future__ import annotations

from benchmarks.peers.case import CROSS_LAYERS, DEEP, Case


def dense_gradients(workers: int, weights: int) -> float:
    """Of an all-reduce of dense gradients."""
    return 8 * (workers - 1) / workers * weights


def by_sum(workers: int, home: int, width: int) -> float:
    """DES: partial results of ``width`` numbers to homes, gradients back."""
    return 8.0 * (workers - 1) * home * width


def by_gather(workers: int, home: int, numbers: int) -> float:
    """DES: ``numbers`` of pooled vectors per sample to homes, gradients back."""
    return 8 * (workers - 1) / workers * home * numbers


def by_rows(case: Case, unique: float) -> float:
    """DES: distinct rows to homes and their gradients back, and where each lookup finds its row."""
    lookups = case.home * case.fields * case.bag
    return (case.workers - 1) / case.workers * (8 * unique * case.width + 4 * lookups)


def des(case: Case, unique: float, weights: int) -> float:
    """DES by the cheapest of its exchanges, dense gradients too."""
    hidden = case.hidden[0] if case.model in DEEP else 0
    sums = {"lr": 1, "fm": 1 + case.factors, "wide_deep": 1, "deepfm": 1 + case.factors, "dcn": CROSS_LAYERS + 1}
    ways = [by_rows(case, unique)]
    if case.model in sums:
        ways.append(by_sum(case.workers, case.home, sums[case.model] + hidden))
    if case.model in DEEP:
        vectors = by_gather(case.workers, case.home, case.fields * case.factors)
        ways.append(vectors + by_sum(case.workers, case.home, case.linear))
    return min(ways) + dense_gradients(case.workers, weights)


def table_wise(case: Case) -> float:
    """TorchRec, pooled vectors to homes, gradients back, and ids before."""
    padded = sum(part.padded for part in case.parts)
    ids = len(case.parts) * (8 * case.bag + 4)
    return (case.workers - 1) / case.workers * case.home * case.fields * (8 * padded + ids)


def least_table_wise(case: Case) -> float:
    """What table-wise sharding needs at least: rows as they are, ids once."""
    return (case.workers - 1) / case.workers * case.home * case.fields * (8 * case.width + 8 * case.bag + 4)


def row_wise(case: Case, around: int = 12) -> float:
    """TorchRec, every worker's part of every pooled vector; ``around`` is 8 where a reduce-scatter is one."""
    padded = sum(part.padded for part in case.parts)
    lookups = case.home * case.fields * len(case.parts)
    ids = (case.workers - 1) / case.workers * lookups * 8 * case.bag + (case.workers - 1) * lookups * 4
    return around * (case.workers - 1) * case.home * case.fields * padded + ids


def parameter_server(case: Case, unique: float) -> float:
    """Distinct rows there and their gradients back, each with its id."""
    return 2 * (case.workers - 1) / case.workers * unique * (4 * case.width + 8)


def sparse(case: Case, unique: float) -> float:
    """All workers' sparse gradients to all."""
    return (case.workers - 1) * unique * (4 * case.width + 8)


def computed(name: str, case: Case, unique: float, weights: int) -> float:
    """Bytes of one peer's worker in one step, dense gradients too; 0 for a single process.

    Args:
        unique: distinct rows of a home slice.
        weights: dense weights of the model.
    """
    rows = {
        "table_wise": table_wise(case),
        "row_wise": row_wise(case),
        "server": parameter_server(case, unique),
        "server_async": parameter_server(case, unique),
        "sparse": sparse(case, unique),
    }
    return rows[name] + dense_gradients(case.workers, weights) if name in rows else 0.0


def least(name: str, case: Case, unique: float, weights: int) -> float:
    """The same where the library sends no more than its kind of sharding needs."""
    rows = {"table_wise": least_table_wise(case), "row_wise": row_wise(case, 8)}
    if name in rows:
        return rows[name] + dense_gradients(case.workers, weights)
    return computed(name, case, unique, weights)
