"""A parameter server: every worker serves 1/N of the rows over torch RPC and trains its home slice.

A worker asks each server once per distinct row (de-duplication), and sends one summed gradient per row back.
Synchronous: a server applies the sum of all workers' gradients once, and only then lets them go on; dense gradients are
all-reduced. Asynchronous: gradients are applied as they come, dense weights live on the servers as well, and the next
step begins without waiting: another algorithm, shown for its speed. TensorPipe's ``uv`` and ``basic`` are TCP, so that
bytes can be counted.

Dims: F fields, R rows per table, b samples at home, J lookups, N workers, S rows of one server, U distinct rows asked,
K numbers per row, Z of state, D dense weights.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import rpc
from torch.futures import Future
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.peers.case import DENSE_RATE, EPS, Case
from benchmarks.peers.head import Head, dense_rule, states, update_rows
from benchmarks.peers.store import dense_file, first_factors, read_home


class Server:
    """A worker's share of the rows; row g of all fields' tables, laid end to end, is number g // N of server g % N."""

    def __init__(self, case: Case, folder: Path, rank: int, workers: int, synchronous: bool) -> None:
        self._case, self._workers, self._synchronous = case, workers, synchronous
        self.rows_SK = torch.zeros(-(-case.fields * case.table_rows // workers), case.width)
        if case.vector:
            for field in range(case.fields):
                g = torch.arange(field * case.table_rows, (field + 1) * case.table_rows)
                here = g[g % workers == rank]
                factors = first_factors(case, folder, field)[here - field * case.table_rows]
                self.rows_SK[here // workers, case.linear :] = factors
        self._state_SZ = torch.zeros(len(self.rows_SK), states(case))
        self._come: list[tuple[Tensor, Tensor]] = []
        self._waiting: list[Future[None]] = []
        self._lock = threading.Lock()
        self.dense_D = torch.zeros(0)
        self._dense_state_D = torch.zeros(0)

    def serve_dense(self, weights_D: Tensor) -> None:
        """Take over a piece of the dense weights."""
        self.dense_D, self._dense_state_D = weights_D.clone(), torch.zeros_like(weights_D)

    def pull(self, places_U: Tensor) -> Tensor:
        """Rows [U, K]."""
        return self.rows_SK.index_select(0, places_U)

    def push(self, places_U: Tensor, gradient_UK: Tensor) -> Future[None]:
        """Apply a gradient; done at once, or when all workers' gradients of the step are applied."""
        done: Future[None] = Future()
        with self._lock:
            self._come.append((places_U, gradient_UK))
            self._waiting.append(done)
            if self._synchronous and len(self._come) < self._workers:
                return done
            self._apply()
            waiting, self._come, self._waiting = self._waiting, [], []
        for worker in waiting:
            worker.set_result(None)
        return done

    def push_dense(self, gradient_D: Tensor) -> None:
        """Adagrad on the dense weights that live here."""
        with self._lock:
            self._dense_state_D += gradient_D.square()
            self.dense_D -= DENSE_RATE * gradient_D / (self._dense_state_D.sqrt() + EPS)

    def _apply(self) -> None:
        """One update per row from the sum of its gradients."""
        places, gradients = (torch.cat(parts) for parts in zip(*self._come, strict=True))
        unique_U, inverse = places.unique(return_inverse=True)
        sum_UK = torch.zeros(len(unique_U), gradients.shape[1]).index_add_(0, inverse, gradients)
        update_rows(self._case, self.rows_SK, self._state_SZ, unique_U, sum_UK)


_server: Server


def _pull(places_U: Tensor) -> Tensor:
    return _server.pull(places_U)


@rpc.functions.async_execution
def _push(places_U: Tensor, gradient_UK: Tensor) -> Future[None]:
    return _server.push(places_U, gradient_UK)


def _pull_dense() -> Tensor:
    return _server.dense_D


def _push_dense(gradient_D: Tensor) -> None:
    _server.push_dense(gradient_D)


class Client:
    """One worker: its server, and the training of its home slice."""

    def __init__(self, case: Case, folder: Path, rank: int, workers: int, synchronous: bool) -> None:
        global _server
        self._case, self._rank, self._workers, self._synchronous = case, rank, workers, synchronous
        rows_TFL, self._labels_Tb = read_home(case, folder, rank, workers)
        starts_F1 = torch.arange(case.fields)[:, None] * case.table_rows
        self._stride = -(-case.fields * case.table_rows // workers)
        # Numbered server by server, so that sorted distinct rows lie together by server at no cost.
        self._places_TFL = [(g % workers) * self._stride + g // workers for g in (r + starts_F1 for r in rows_TFL)]
        _server = Server(case, folder, rank, workers, synchronous)
        self._head = Head(case)
        self._head.load_state_dict(torch.load(dense_file(case, folder)))
        self._dense = dense_rule(self._head)
        weights_D = parameters_to_vector(self._head.parameters()).detach()
        self._pieces = [len(piece) for piece in weights_D.tensor_split(workers)]
        _server.serve_dense(weights_D.tensor_split(workers)[rank])
        self._sent: list[Future[None]] = []
        dist.init_process_group("gloo")
        options = rpc.TensorPipeRpcBackendOptions(
            init_method=f"tcp://{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT']) + 1}",
            num_worker_threads=workers + 1,
            rpc_timeout=600,
            _transports=["uv"],
            _channels=["basic"],
        )
        rpc.init_rpc(str(rank), rank=rank, world_size=workers, rpc_backend_options=options)

    def train(self, first: int, count: int) -> None:
        for step in range(first, first + count):
            unique_U, inverse_L = self._places_TFL[step].flatten().unique(return_inverse=True)
            places = self._by_server(unique_U)
            rows_UK = self._pull(places).requires_grad_()
            if not self._synchronous:
                dense = [self._ask(server, _pull_dense, ()) for server in range(self._workers)]
                vector_to_parameters(torch.cat([piece.wait() for piece in dense]), self._head.parameters())
            logits_b = self._logits(rows_UK, inverse_L)
            loss = binary_cross_entropy_with_logits(logits_b, self._labels_Tb[step]) / self._workers
            self._dense.zero_grad()
            loss.backward()
            gradients = rows_UK.grad.split([len(here) for here in places])
            for answer in self._sent:
                answer.wait()
            # Clones: of a view TensorPipe may send the whole it is a part of.
            self._sent = [
                self._ask(server, _push, (here, gradient.clone()))
                for server, (here, gradient) in enumerate(zip(places, gradients, strict=True))
            ]
            self._step_dense()
        if self._synchronous:
            self._settle()

    def _step_dense(self) -> None:
        flat_D = torch.cat([weight.grad.flatten() for weight in self._head.parameters()])
        if not self._synchronous:
            pieces = flat_D.split(self._pieces)
            self._sent += [self._ask(server, _push_dense, (piece.clone(),)) for server, piece in enumerate(pieces)]
            return
        dist.all_reduce(flat_D)
        sizes = [weight.numel() for weight in self._head.parameters()]
        for weight, gradient in zip(self._head.parameters(), flat_D.split(sizes), strict=True):
            weight.grad = gradient.view_as(weight)
        self._dense.step()
        self._settle()

    @torch.no_grad()
    def score(self) -> Tensor:
        self._settle()
        unique_U, inverse_L = self._places_TFL[0].flatten().unique(return_inverse=True)
        return self._logits(self._pull(self._by_server(unique_U)), inverse_L)

    def _by_server(self, unique_U: Tensor) -> list[Tensor]:
        """Places in each server's rows, of sorted distinct rows."""
        edges = torch.searchsorted(unique_U, torch.arange(1, self._workers) * self._stride)
        return [here - server * self._stride for server, here in enumerate(unique_U.tensor_split(edges))]

    def _pull(self, places: list[Tensor]) -> Tensor:
        answers = [self._ask(server, _pull, (here,)) for server, here in enumerate(places)]
        return torch.cat([answer.wait() for answer in answers])

    def _ask(self, server: int, call: Callable[..., Any], arguments: tuple[Tensor, ...]) -> Future:
        """A call of a server's function; one's own server is called without the network."""
        if server != self._rank:
            return rpc.rpc_async(str(server), call, arguments)
        answer = call(*arguments)
        if isinstance(answer, Future):
            return answer
        done: Future = Future()
        done.set_result(answer)
        return done

    def _settle(self) -> None:
        for answer in self._sent:
            answer.wait()
        self._sent = []

    def _logits(self, rows_UK: Tensor, inverse_L: Tensor) -> Tensor:
        case = self._case
        looked_up = rows_UK.index_select(0, inverse_L.flatten()).view(case.fields, -1, case.bag, case.width)
        pooled_FbK = looked_up[:, :, 0] if case.bag == 1 else looked_up.sum(2)
        return self._head(pooled_FbK.transpose(0, 1))

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._settle()
        rpc.shutdown()
        dist.destroy_process_group()


def build(case: Case, folder: Path, rank: int, workers: int, synchronous: bool) -> Client:
    """One worker and server."""
    return Client(case, folder, rank, workers, synchronous)
