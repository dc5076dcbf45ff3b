"""How partial results meet: all operators of a model in one exchange each way per step.

Every worker adds up, for the whole global batch, what it owns; each sample's home adds the workers'
partials in rank order and runs ``finish``::

    owner w:  packed_GC = [ partials of ``sum`` operators | rests | pooled field vectors ]
              row b travels to the home of sample b                         (all-to-all)
    home:     total_bP  = sum over w of its columns   or   operator.collect(all field vectors)
    backward: d total_bP travels back to every owner                        (all-to-all)

so ``sum`` sends 2 (N-1) b P numbers per worker and step, ``gather`` 2 (N-1)/N b D, D = k per field piece:
``sum`` is the cheaper iff P < D / N. An operator that reads vectors which another one brought home
anyway pays only for its ``rest``. Both are all-to-alls with a local sum in fixed order: a library's
reduce-scatter may be an all-reduce inside (gloo: double bytes), or want equal shares (NCCL).

Dims: G samples of the global batch, b of this home, N workers, C columns of a worker's packed partials,
P numbers of a partial, F fields, O owned by a worker, k factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from des_core.engine.collectives import Collectives
from des_core.engine.operators import Operator, Shard
from des_core.engine.plan import home_edges, line_of, lines


class Exchange:
    """Carries partials home and gradients back.

    Args:
        operators: the model's operators by name.
        choice: ``sum`` or ``gather`` for each.
        owned: numbers of the fields each worker owns pieces of.
        fields: fields of the model, F.
    """

    def __init__(
        self,
        operators: Mapping[str, Operator],
        choice: Mapping[str, str],
        owned: Sequence[Sequence[int]],
        fields: int,
        peers: Collectives,
    ) -> None:
        self._operators, self._choice, self._fields, self._peers = operators, choice, fields, peers
        self._columns = [lines(operators, choice, len(pieces)) for pieces in owned]
        self._field_of_piece = torch.tensor([f for pieces in owned for f in pieces], device=peers.device)
        self._groups = {line_of(op): op.reads for name, op in operators.items() if choice[name] == "gather"}

    def totals(self, shard: Shard) -> dict[str, Tensor]:
        """Every operator's total ``[b, P]`` of the home slice, from the partials of all workers.

        Traffic both ways: see the file's head. Gradients return to ``shard.rows_UK`` and to dense
        weights that partials read.
        """
        packed_GC = torch.cat([self._packed(name, shard) for name in self._operators] + self._vectors(shard), 1)
        edges = home_edges(shard.samples, self._peers.workers)
        sizes = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
        flat: Tensor = _ToHomes.apply(packed_GC, sizes, self._columns, self._peers)  # type: ignore[no-untyped-call]
        mine = sizes[self._peers.rank]
        widths = [sum(columns.values()) for columns in self._columns]
        blocks = [
            piece.view(mine, width)
            for piece, width in zip(flat.split([mine * width for width in widths]), widths, strict=True)
        ]
        return self._unpacked(blocks)

    def _packed(self, name: str, shard: Shard) -> Tensor:
        operator = self._operators[name]
        return operator.partial(shard) if self._choice[name] == "sum" else operator.partial_rest(shard)

    def _vectors(self, shard: Shard) -> list[Tensor]:
        return [shard.pooled_BOK[:, :, reads].flatten(1) for reads in self._groups.values()]

    def _unpacked(self, blocks: list[Tensor]) -> dict[str, Tensor]:
        """Totals from one block of columns per worker, added in rank order."""
        sums, at = {}, 0
        for name, operator in self._operators.items():
            width = operator.width if self._choice[name] == "sum" else operator.rest
            total = blocks[0][:, at : at + width]
            for block in blocks[1:]:
                total = total + block[:, at : at + width]
            sums[name], at = total, at + width
        pooled = {}
        starts = [at] * len(blocks)
        for line, reads in self._groups.items():
            numbers = reads.stop - reads.start
            pieces = []
            for worker, block in enumerate(blocks):
                width = self._columns[worker][line]
                pieces.append(block[:, starts[worker] : starts[worker] + width].unflatten(1, (-1, numbers)))
                starts[worker] += width
            all_pieces = torch.cat(pieces, 1)
            home = all_pieces.new_zeros(len(all_pieces), self._fields, numbers)
            pooled[line] = home.index_add(1, self._field_of_piece, all_pieces)
        return {
            name: operator.collect(pooled[line_of(operator)], sums[name])
            if self._choice[name] == "gather"
            else sums[name]
            for name, operator in self._operators.items()
        }

    def sum_over_workers(self, part: Tensor) -> Tensor:
        """Batch norm's sum, with its gradient: one all-reduce of ``part`` each way."""
        total: Tensor = _Total.apply(part, self._peers)  # type: ignore[no-untyped-call]
        return total


class _ToHomes(Function):
    """All-to-all of rows to their homes; the gradient takes the same way back."""

    @staticmethod
    def forward(
        ctx: Any, packed_GC: Tensor, sizes: list[int], columns: list[dict[str, int]], peers: Collectives
    ) -> Tensor:
        ctx.sizes, ctx.columns, ctx.peers, ctx.shape = sizes, columns, peers, packed_GC.shape
        send = [{line: size * width for line, width in columns[peers.rank].items()} for size in sizes]
        receive = [sizes[peers.rank] * sum(lines.values()) for lines in columns]
        return peers.all_to_all(packed_GC.reshape(-1), send, receive)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        rank = ctx.peers.rank
        send = [{line: ctx.sizes[rank] * width for line, width in lines.items()} for lines in ctx.columns]
        receive = [size * ctx.shape[1] for size in ctx.sizes]
        return ctx.peers.all_to_all(gradients[0], send, receive).view(ctx.shape), None, None, None


class _Total(Function):
    """A sum over workers that every worker's own loss reads: its backward is a sum over workers."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, peers: Collectives) -> Tensor:
        ctx.peers = peers
        return peers.all_reduce({"batch norm": part})["batch norm"]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.peers.all_reduce({"batch norm": gradients[0]})["batch norm"], None
