"""The exchange of partial results: all operators of a model share one exchange each way per step.

Every worker adds up, for the whole global batch, what it owns; each sample's home adds the workers'
partials in rank order and runs what follows::

    owner w:  packed_GC = [ partials of ``sum`` operators | rests | pooled field vectors ]
              row b travels to the home of sample b                         (all-to-all)
    home:     total_bP  = sum over w of its columns   or   operator.collect(all field vectors)
    backward: d total_bP travels back to every owner                        (all-to-all)

so ``sum`` sends 2 (N-1) b P numbers per worker and step, ``gather`` 2 (N-1)/N b D, D = k per field piece:
``sum`` is the cheaper iff P < D / N. An operator that reads vectors which another one brought home
anyway pays only for its ``rest``. Both are all-to-alls with a local sum in fixed order: a library's
reduce-scatter may be an all-reduce inside (gloo: double bytes), or want equal shares (NCCL).

``rows`` brings home the unique rows that a home's samples read, and runs the operators there on all lookups, as
a single worker would: 2 (N-1)/N U k numbers, for all operators at once. Replicated, the paper's own form, adds
the partials up on every worker for all samples (one all-reduce of [G, P], nothing back).

Dims: G samples of the global batch, b of this home, N workers, C columns of a worker's packed partials,
P numbers of a partial, F fields, O owned by a worker, M dense inputs, k factors, U unique rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from des_core.engine.exchange.collectives import Collectives
from des_core.engine.exchange.plan import Plan, home_edges, lines
from des_core.engine.exchange.row_routing import RowRouting, arrived
from des_core.engine.operators import Shard, totals_alone


class Exchange:
    """Sends partial results to the homes of their samples and gradients back, as a plan says."""

    def __init__(self, plan: Plan, peers: Collectives) -> None:
        self._plan, self._peers = plan, peers
        self._operators = plan.model.by_name
        factors = plan.model.factors
        self._columns = [lines(self._operators, plan.choice, len(pieces), factors) for pieces in plan.owned]
        pieces = [field for owned in plan.owned for field in owned]
        self._field_of_piece = torch.tensor(pieces, dtype=torch.int64, device=peers.device)
        self._fields = plan.fields
        self._payload = torch.bfloat16 if plan.payload_bytes == 2 else None

    def totals(self, shard: Shard, inputs_bM: Tensor, routing: RowRouting | None) -> dict[str, Tensor]:
        """Every operator's total ``[b, P]`` of the home slice, from the partials of all workers.

        Traffic both ways: see the file's head. Gradients return to ``shard.rows_UK`` and to dense
        weights that partials read.

        Args:
            inputs_bM: dense inputs of the home slice.
            routing: of this batch, with ``rows``.
        """
        edges = home_edges(shard.samples, self._peers.workers)
        sizes = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
        if routing is not None:
            return totals_alone(self._operators, self._brought_home(shard, inputs_bM, routing, sizes[self._peers.rank]))
        packed_GC = torch.cat([self._packed(name, shard) for name in self._operators] + self._vectors(shard), 1)
        mine = sizes[self._peers.rank]
        send = [{line: size * width for line, width in self._columns[self._peers.rank].items()} for size in sizes]
        receive = [{line: mine * width for line, width in columns.items()} for columns in self._columns]
        flat = self._swap(packed_GC.reshape(-1), send, receive)
        widths = [sum(columns.values()) for columns in self._columns]
        blocks = [
            piece.view(mine, width)
            for piece, width in zip(flat.split([mine * width for width in widths]), widths, strict=True)
        ]
        return self._unpacked(blocks, inputs_bM)

    def totals_everywhere(self, shard: Shard) -> dict[str, Tensor]:
        """Every operator's total ``[G, P]`` of all samples, on every worker.

        One all-reduce forward. Every worker's loss reads the whole total, so each takes 1/N of the loss, and the
        backward sum of N equal gradients is a product.
        """
        partials = {name: operator.partial(shard) for name, operator in self._operators.items()}
        packed_GC = torch.cat(list(partials.values()), 1)
        widths = {name: part.shape[1] for name, part in partials.items()}
        total_GC: Tensor = _Everywhere.apply(packed_GC, widths, self._peers)  # type: ignore[no-untyped-call]
        return dict(zip(partials, total_GC.split(list(widths.values()), 1), strict=True))

    def _swap(self, flat: Tensor, send: list[dict[str, int]], receive: list[dict[str, int]]) -> Tensor:
        swapped: Tensor = _Swap.apply(flat, send, receive, self._payload, self._peers)  # type: ignore[no-untyped-call]
        return swapped

    def _packed(self, name: str, shard: Shard) -> Tensor:
        operator = self._operators[name]
        part = operator.partial(shard) if self._plan.choice[name] == "sum" else operator.partial_rest(shard)
        # A product of 16-bit numbers travels in the precision of the rows, as the plan says.
        return part.to(shard.x_L.dtype)

    def _vectors(self, shard: Shard) -> list[Tensor]:
        return [shard.vectors_BOk.flatten(1)] if "vectors" in self._columns[0] else []

    def _unpacked(self, blocks: list[Tensor], inputs_bM: Tensor) -> dict[str, Tensor]:
        """Totals from one block of columns per worker, added in rank order."""
        choice = self._plan.choice
        sums, at = {}, 0
        for name, operator in self._operators.items():
            width = operator.width if choice[name] == "sum" else operator.rest
            total = blocks[0][:, at : at + width]
            for block in blocks[1:]:
                total = total + block[:, at : at + width]
            sums[name], at = total, at + width
        if "vectors" not in self._columns[0]:
            return sums
        pieces_bOk = torch.cat([block[:, at:].unflatten(1, (-1, self._plan.model.factors)) for block in blocks], 1)
        vectors_bFk = pieces_bOk.new_zeros(len(pieces_bOk), self._fields, pieces_bOk.shape[2])
        vectors_bFk = vectors_bFk.index_add(1, self._field_of_piece, pieces_bOk)
        return {
            name: operator.collect(vectors_bFk, inputs_bM, sums[name]) if choice[name] == "gather" else sums[name]
            for name, operator in self._operators.items()
        }

    def _brought_home(self, shard: Shard, inputs_bM: Tensor, routing: RowRouting, samples: int) -> Shard:
        """All lookups of the home slice and their rows, by two messages with sizes and places, then the rows."""
        peers, reads, device = self._peers, self._plan.reads, shard.rows_UK.device
        width = reads.stop - reads.start
        sizes = torch.tensor([*zip(routing.rows_N, routing.message_N, strict=True)], dtype=torch.int64, device=device)
        one = [{"rows": 2} for _ in range(peers.workers)]
        come_N2 = peers.all_to_all(sizes.reshape(-1), one, [2] * peers.workers).view(-1, 2).cpu()
        rows_N, message_N = (come_N2[:, column].tolist() for column in (0, 1))
        message = torch.from_numpy(routing.message).to(device)
        come = peers.all_to_all(message, [{"rows": int(n)} for n in routing.message_N], message_N).cpu()
        messages = [part.numpy() for part in come.split(message_N)]
        inverse_L, sample_L, field_L, x_L = (
            torch.from_numpy(column).to(device)
            for column in arrived(messages, come_N2[:, 0].numpy(), self._plan.pieces, samples)
        )
        sent_Uk = shard.rows_UK[:, reads].index_select(0, torch.from_numpy(routing.rows).to(device))
        send = [{"rows": int(n) * width} for n in routing.rows_N]
        flat = self._swap(sent_Uk.reshape(-1), send, [{"rows": n * width} for n in rows_N])
        rows_Uk = flat.view(-1, width)
        come_home = Shard(
            rows_UK=rows_Uk if reads.start == 0 else torch.nn.functional.pad(rows_Uk, (1, 0)),
            inverse_L=inverse_L,
            sample_L=sample_L,
            piece_L=field_L,
            x_L=x_L.to(rows_Uk.dtype),
            samples=samples,
            fields_O=torch.arange(self._fields, device=device),
            inputs_BM=inputs_bM,
            wide=len({number for own in self._plan.wide for number in own}),
        )
        return self._plan.with_pooling(come_home)

    def sum_over_workers(self, line: str, part: Tensor) -> Tensor:
        """A sum that every worker's loss reads, with its gradient: one all-reduce of ``part`` each way."""
        total: Tensor = _Total.apply(part, line, self._peers)  # type: ignore[no-untyped-call]
        return total


class _Swap(Function):
    """All-to-all of numbers; the gradient takes the same way back, in as few bits."""

    @staticmethod
    def forward(
        ctx: Any,
        flat: Tensor,
        send: list[dict[str, int]],
        receive: list[dict[str, int]],
        payload: torch.dtype | None,
        peers: Collectives,
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.payload, ctx.peers = send, receive, payload, peers
        return _carried(flat, send, receive, payload, peers, "forward")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        back = _carried(gradients[0], ctx.receive, ctx.send, ctx.payload, ctx.peers, "backward")
        return back, None, None, None, None


def _carried(
    flat: Tensor,
    send: list[dict[str, int]],
    receive: list[dict[str, int]],
    payload: torch.dtype | None,
    peers: Collectives,
    way: str,
) -> Tensor:
    come = peers.all_to_all(flat.to(payload or flat.dtype), send, [sum(lines.values()) for lines in receive], way)
    return come.to(flat.dtype)


class _Total(Function):
    """A sum over workers that every worker's own loss reads: its backward is a sum over workers."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, line: str, peers: Collectives) -> Tensor:
        ctx.peers, ctx.line = peers, line
        return peers.all_reduce({line: part})[line]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.peers.all_reduce({ctx.line: gradients[0]}, "backward")[ctx.line], None, None


class _Everywhere(Function):
    """A sum over workers that every worker reads alike, each for 1/N of the loss."""

    @staticmethod
    def forward(ctx: Any, packed_GC: Tensor, widths: dict[str, int], peers: Collectives) -> Tensor:
        ctx.workers = peers.workers
        parts = peers.all_reduce(dict(zip(widths, packed_GC.split(list(widths.values()), 1), strict=True)))
        return torch.cat(list(parts.values()), 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.workers, None, None
