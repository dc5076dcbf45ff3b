"""Update rules: for the rows a batch touched, and for the dense weights.

Every row has one owner, which sees the summed gradient of the whole batch, so any rule that looks
at one row is exactly the single-machine rule. The law is the lazy one: rows not touched keep value and
state; Adam corrects its bias by the global step, as torch.optim.SparseAdam. With G = gradient + l2 w::

    sgd              w -= lr G
    adagrad          s += G^2;  w -= lr G / (sqrt(s) + eps)
    rowwise_adagrad  the same with one s for w and one, the mean of G^2, for v_1..v_k
    adam             m += (1-b1)(G-m);  n += (1-b2)(G^2-n);  w -= lr sqrt(1-b2^t)/(1-b1^t) m / (sqrt(n) + eps)
    adamw            w *= 1 - lr weight_decay, then adam; ``Decay`` knows the steps a row missed
    ftrl             z += g - (sqrt(n + g^2) - sqrt(n))/lr w;  n += g^2;  s = -z, each shrunk by l1 towards 0
                     w = s / D,  D = (ftrl_beta + sqrt(n))/lr + l2;  here l2 is of this form, g the bare gradient
    group_ftrl       s times max(0, 1 - group_l1 sqrt(K)/|s|) first: the group is the row, [w | v_1..v_k] in one, for
                     only a row that is zero as a whole frees its memory. As in the paper's published code |s| takes
                     no notice of D: zero exactly where group lasso is, shrunk alike where D is the same in a row

FTRL keeps a weight in z and the closed form gives it back. A row is born with z = -D w: its first value counts as
evidence, which l1 and group_l1 may find too little, so that a value met now and then ends at zero. From then on, where
w is not zero the two say the same and z is taken from w, s = D w (1 + group_l1 sqrt(K)/|D w|): a new learning
rate moves no weight by itself (it is FTRL at the rates lr_t/(beta + sqrt n_t)). Where w is zero z itself is
kept. A weight whose D is 0 (no gradient yet, ftrl_beta = l2 = 0) stays as it is.

Sources: Duchi et al., JMLR 2011; Kingma and Ba, ICLR 2015; Loshchilov and Hutter, ICLR 2019;
row-wise: Gupta et al., "Training recommender systems at scale", arXiv 2019; McMahan et al., "Ad click prediction",
KDD 2013; Yue et al., "Adaptive optimizers with sparse group lasso", ECML-PKDD 2021.
Dims: U rows touched, K numbers per row, Z numbers of state, S slots, P pieces of constant decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn.functional import softshrink
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from des_core.config import OptimizerConfig
from des_core.engine.device.support import sent

Array = np.ndarray[Any, np.dtype[Any]]

# Rows read ahead: enough for their misses to overlap, few enough to stay in the first cache.
AHEAD = 16


def state_width(rule: str, width: int) -> int:
    """Numbers of state per row, Z, for rows of ``width`` numbers."""
    return {"sgd": 0, "adagrad": width, "rowwise_adagrad": min(width, 2)}.get(rule, 2 * width)


def apply(
    config: OptimizerConfig,
    rows_SK: Tensor,
    state_SZ: Tensor,
    slots_U: Tensor,
    gradient_UK: Tensor,
    step: int,
    rate: float,
) -> None:
    """Update the rows of ``slots_U``, all different, in place; the arguments are those of ``update_rows``."""
    if rows_SK.device.type != "cpu":
        rows_UK, state_UZ = rows_SK.index_select(0, slots_U), state_SZ.index_select(0, slots_U)
        rows_UK, state_UZ = update_rows(config, rows_UK, gradient_UK, state_UZ, step, rate)
        rows_SK.index_copy_(0, slots_U, rows_UK)
        state_SZ.index_copy_(0, slots_U, state_UZ)
        return
    kernels: dict[str, Any] = {
        "sgd": _sgd,
        "adagrad": _adagrad,
        "rowwise_adagrad": _rowwise_adagrad,
        "adam": _adam,
        "adamw": _adam,
    }
    kernel = kernels.get(config.name, _ftrl)
    arrays = [tensor.numpy() for tensor in (rows_SK, state_SZ, slots_U, gradient_UK.contiguous())]
    kernel(*arrays, tuple(map(arrays[0].dtype.type, rule_numbers(config, rows_SK.shape[1], step, rate))))


def rule_numbers(config: OptimizerConfig, width: int, step: int, rate: float) -> tuple[float, ...]:
    """The numbers that a rule's kernel takes at a step, for rows of ``width`` numbers."""
    l2, eps = config.l2, config.eps
    if config.name == "sgd":
        return rate, l2
    if config.name in ("adagrad", "rowwise_adagrad"):
        return rate, l2, eps
    if config.name in ("ftrl", "group_ftrl"):
        return 1 / rate, l2, config.ftrl_beta, config.l1, config.group_l1 * width**0.5
    kept = 1 - rate * config.weight_decay
    return _adam_rate(config, step, rate), l2, eps, kept, 1 - config.beta1, 1 - config.beta2


def update_rows(
    config: OptimizerConfig, rows_UK: Tensor, gradient_UK: Tensor, state_UZ: Tensor, step: int, rate: float
) -> tuple[Tensor, Tensor]:
    """New rows [U, K] and state [U, Z] after global step ``step`` (from 1) at learning rate ``rate``."""
    width = rows_UK.shape[1]
    if config.name in ("ftrl", "group_ftrl"):
        return _ftrl_rows(config, rows_UK, gradient_UK, state_UZ, rate)
    gradient_UK = gradient_UK + config.l2 * rows_UK if config.l2 else gradient_UK
    if config.name == "sgd":
        return rows_UK - rate * gradient_UK, state_UZ
    if config.name == "adagrad":
        state_UZ = state_UZ + gradient_UK.square()
        return rows_UK - rate * gradient_UK / (state_UZ.sqrt() + config.eps), state_UZ
    if config.name == "rowwise_adagrad":
        square_UK = gradient_UK.square()
        mean_UZ = torch.cat([square_UK[:, :1], square_UK[:, 1:].mean(1, keepdim=True)], 1)[:, : state_UZ.shape[1]]
        state_UZ = state_UZ + mean_UZ
        rate_UZ = rate / (state_UZ.sqrt() + config.eps)
        rate_UK = torch.cat([rate_UZ[:, :1], rate_UZ[:, 1:].expand(-1, width - 1)], 1)
        return rows_UK - rate_UK * gradient_UK, state_UZ
    first_UK = torch.lerp(state_UZ[:, :width], gradient_UK, 1 - config.beta1)
    second_UK = torch.lerp(state_UZ[:, width:], gradient_UK.square(), 1 - config.beta2)
    kept_UK = rows_UK * (1 - rate * config.weight_decay)
    moved_UK = kept_UK - _adam_rate(config, step, rate) * first_UK / (second_UK.sqrt() + config.eps)
    return moved_UK, torch.cat([first_UK, second_UK], 1)


def _adam_rate(config: OptimizerConfig, step: int, rate: float) -> float:
    corrected: float = rate * (1 - config.beta2**step) ** 0.5 / (1 - config.beta1**step)
    return corrected


def _ftrl_rows(
    config: OptimizerConfig, rows_UK: Tensor, gradient_UK: Tensor, state_UZ: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    width = rows_UK.shape[1]
    group = config.group_l1 * width**0.5
    z_UK, n_UK = state_UZ[:, :width], state_UZ[:, width:]
    plain_UK = rows_UK * ((config.ftrl_beta + n_UK.sqrt()) / rate + config.l2)
    length_U1 = plain_UK.norm(dim=1, keepdim=True)
    held_UK = plain_UK * torch.where(length_U1 > 0, (length_U1 + group) / length_U1, 0)
    born_UK = (z_UK == 0) & (n_UK == 0)
    kept_UK = torch.where(rows_UK == 0, z_UK, -held_UK - config.l1 * rows_UK.sign())
    z_UK = torch.where(born_UK, -plain_UK, kept_UK)
    after_UK = n_UK + gradient_UK.square()
    z_UK = z_UK + gradient_UK - (after_UK.sqrt() - n_UK.sqrt()) / rate * rows_UK
    s_UK = softshrink(-z_UK, config.l1)
    length_U1 = s_UK.norm(dim=1, keepdim=True)
    s_UK = s_UK * torch.where(length_U1 > group, (length_U1 - group) / length_U1, 0)
    divisor_UK = (config.ftrl_beta + after_UK.sqrt()) / rate + config.l2
    return torch.where(divisor_UK > 0, s_UK / divisor_UK, rows_UK), torch.cat([z_UK, after_UK], 1)


# The kernels compute in the rows' own precision: a literal or an integer among the numbers would make it double.
# Python's error model would test every divisor for zero, and so forbid vector instructions.


@njit(nogil=True, cache=True, error_model="numpy")
def _ahead(rows_SK: Array, state_SZ: Array, slots_U: Array, first: int) -> Any:
    """Read the next rows' cache lines, so that their misses overlap; the sum is returned only to keep the reads."""
    total = rows_SK.dtype.type(0)
    for slot in slots_U[first : first + AHEAD]:
        for k in range(0, rows_SK.shape[1], 8):
            total += rows_SK[slot, k]
        for k in range(0, state_SZ.shape[1], 8):
            total += state_SZ[slot, k]
    return total


# Each kernel returns what it read ahead, or the compiler would drop the reads.


@njit(nogil=True, cache=True, error_model="numpy")
def _sgd(rows_SK: Array, state_SZ: Array, slots_U: Array, gradient_UK: Array, numbers: Any) -> Any:
    read, (rate, l2) = numbers[0], numbers
    for u in range(len(slots_U)):
        if u % AHEAD == 0:
            read += _ahead(rows_SK, state_SZ, slots_U, u)
        slot = slots_U[u]
        for k in range(rows_SK.shape[1]):
            rows_SK[slot, k] -= rate * (gradient_UK[u, k] + l2 * rows_SK[slot, k])
    return read


@njit(nogil=True, cache=True, error_model="numpy")
def _adagrad(rows_SK: Array, state_SZ: Array, slots_U: Array, gradient_UK: Array, numbers: Any) -> Any:
    read, (rate, l2, eps) = numbers[0], numbers
    for u in range(len(slots_U)):
        if u % AHEAD == 0:
            read += _ahead(rows_SK, state_SZ, slots_U, u)
        slot = slots_U[u]
        for k in range(rows_SK.shape[1]):
            g = gradient_UK[u, k] + l2 * rows_SK[slot, k]
            state_SZ[slot, k] += g * g
            rows_SK[slot, k] -= rate * g / (math.sqrt(state_SZ[slot, k]) + eps)
    return read


@njit(nogil=True, cache=True, error_model="numpy")
def _rowwise_adagrad(rows_SK: Array, state_SZ: Array, slots_U: Array, gradient_UK: Array, numbers: Any) -> Any:
    read, (rate, l2, eps) = numbers[0], numbers
    width = rows_SK.shape[1]
    for u in range(len(slots_U)):
        if u % AHEAD == 0:
            read += _ahead(rows_SK, state_SZ, slots_U, u)
        slot = slots_U[u]
        g = gradient_UK[u, 0] + l2 * rows_SK[slot, 0]
        state_SZ[slot, 0] += g * g
        rows_SK[slot, 0] -= rate * g / (math.sqrt(state_SZ[slot, 0]) + eps)
        if width > 1:
            total = rows_SK.dtype.type(0)
            for k in range(1, width):
                g = gradient_UK[u, k] + l2 * rows_SK[slot, k]
                total += g * g
            state_SZ[slot, 1] += total / rows_SK.dtype.type(width - 1)
            own_rate = rate / (math.sqrt(state_SZ[slot, 1]) + eps)
            for k in range(1, width):
                rows_SK[slot, k] -= own_rate * (gradient_UK[u, k] + l2 * rows_SK[slot, k])
    return read


@njit(nogil=True, cache=True, error_model="numpy")
def _adam(rows_SK: Array, state_SZ: Array, slots_U: Array, gradient_UK: Array, numbers: Any) -> Any:
    read, (rate, l2, eps, kept, new_first, new_second) = numbers[0], numbers
    width = rows_SK.shape[1]
    for u in range(len(slots_U)):
        if u % AHEAD == 0:
            read += _ahead(rows_SK, state_SZ, slots_U, u)
        row_K, gradient_K = rows_SK[slots_U[u]], gradient_UK[u]
        first_K, second_K = state_SZ[slots_U[u], :width], state_SZ[slots_U[u], width:]
        for k in range(width):
            g = gradient_K[k] + l2 * row_K[k]
            first_K[k] += new_first * (g - first_K[k])
            second_K[k] += new_second * (g * g - second_K[k])
            row_K[k] = kept * row_K[k] - rate * first_K[k] / (math.sqrt(second_K[k]) + eps)
    return read


@njit(nogil=True, cache=True, error_model="numpy")
def _ftrl(rows_SK: Array, state_SZ: Array, slots_U: Array, gradient_UK: Array, numbers: Any) -> Any:
    read, (steep, l2, beta, l1, group) = numbers[0], numbers
    width = rows_SK.shape[1]
    zero = rows_SK.dtype.type(0)
    s_K, root_K = np.empty(width, rows_SK.dtype), np.empty(width, rows_SK.dtype)
    for u in range(len(slots_U)):
        if u % AHEAD == 0:
            read += _ahead(rows_SK, state_SZ, slots_U, u)
        row_K, gradient_K = rows_SK[slots_U[u]], gradient_UK[u]
        z_K, n_K = state_SZ[slots_U[u], :width], state_SZ[slots_U[u], width:]
        total = zero
        for k in range(width):
            root_K[k] = math.sqrt(n_K[k])
            s_K[k] = row_K[k] * ((beta + root_K[k]) * steep + l2)
            total += s_K[k] * s_K[k]
        length = math.sqrt(total)
        stretch = (length + group) / length if length > zero else zero
        total = zero
        for k in range(width):
            if z_K[k] == zero and n_K[k] == zero:
                z = -s_K[k]
            else:
                z = z_K[k] if row_K[k] == zero else -stretch * s_K[k] - math.copysign(l1, row_K[k])
            n_K[k] += gradient_K[k] * gradient_K[k]
            root = math.sqrt(n_K[k])
            z += gradient_K[k] - (root - root_K[k]) * steep * row_K[k]
            z_K[k], root_K[k] = z, root
            s_K[k] = max(-l1, min(z, l1)) - z
            total += s_K[k] * s_K[k]
        length = math.sqrt(total)
        shrink = (length - group) / length if length > group else zero
        for k in range(width):
            divisor = (beta + root_K[k]) * steep + l2
            if divisor > zero:
                row_K[k] = shrink * s_K[k] / divisor
    return read


class Decay:
    """Decoupled decay of all steps so far, so that rows catch up exactly on what they missed.

    Args:
        pieces: ``[first step, share]`` each, as ``pieces`` holds them: every step from the first one on takes
            that share, learning rate times weight decay, off each weight. Under a schedule each step has its own.
    """

    def __init__(self, pieces: Iterable[Sequence[float]] = ()) -> None:
        self.pieces: list[tuple[int, float]] = []
        # Of each piece the last step before it, log(1 - share), and the logs of all steps up to it; the first takes
        # none.
        self._columns_3C = np.zeros((3, 16))
        self._on_device: Tensor | None = None
        for first, share in pieces:
            self._append(int(first), share)

    def record(self, step: int, share: float) -> None:
        """Note the share that ``step`` takes, later than all before it."""
        if share != (self.pieces[-1][1] if self.pieces else 0.0):
            self._append(step, share)

    def _append(self, step: int, share: float) -> None:
        self.pieces.append((step, share))
        at = len(self.pieces)
        if at == self._columns_3C.shape[1]:
            self._columns_3C = np.concatenate([self._columns_3C, np.zeros_like(self._columns_3C)], 1)
            self._on_device = None
        start, log, total = self._columns_3C[:, at - 1]
        self._columns_3C[:, at] = step - 1, math.log1p(-share), total + (step - 1 - start) * log
        if self._on_device is not None:
            column = torch.from_numpy(self._columns_3C[:, at : at + 1].copy())
            self._on_device[:, at : at + 1] = sent(column, self._on_device.device)

    def missed(self, previous_U: Array, step: int) -> Array:
        """Factors, float64 [U]: what the steps after a row's ``previous`` and before ``step`` make of a weight."""
        starts_P, logs_P, sums_P = self._columns_3C[:, : len(self.pieces) + 1]

        def log_after(steps: Array) -> Array:
            piece = np.searchsorted(starts_P, steps, side="right") - 1
            log: Array = sums_P[piece] + (steps - starts_P[piece]) * logs_P[piece]
            return log

        factors_U: Array = np.exp(log_after(np.array(step - 1)) - log_after(previous_U.astype(np.int64)))
        return factors_U

    def missed_on(self, previous_U: Tensor, step: int) -> Tensor:
        """``missed`` on the device of ``previous_U``, int64 [U]."""
        if self._on_device is None or self._on_device.device != previous_U.device:
            self._on_device = sent(torch.from_numpy(self._columns_3C.copy()), previous_U.device)
        starts_P, logs_P, sums_P = self._on_device[:, : len(self.pieces) + 1].contiguous()
        steps = torch.cat([previous_U.double(), torch.full((1,), step - 1.0, device=previous_U.device).double()])
        piece = torch.searchsorted(starts_P, steps, right=True) - 1
        logs = sums_P[piece] + (steps - starts_P[piece]) * logs_P[piece]
        return torch.exp(logs[-1] - logs[:-1])


class DenseRule:
    """torch's own rule for the dense weights; l2 is its coupled weight_decay (adamw: its decoupled one).

    The arithmetic is torch's, called as its optimizers call it, so that weights and state are theirs bit for bit.
    ``torch.optim.Optimizer`` itself imports torch's compiler, which costs every process more than a second.

    Args:
        config: a rule that torch has for dense weights; its learning rate is given at each step instead.
        parameters: of the model, in its order.
    """

    def __init__(self, config: OptimizerConfig, parameters: Iterable[Tensor]) -> None:
        self.config, self.parameters = config, list(parameters)
        self.state: dict[int, dict[str, Tensor]] = {}
        """Tensors by the weight's number and the slot's name: step; sum, or exp_avg and exp_avg_sq."""

    def zero_gradients(self) -> None:
        """Set to zero the gradients that are there."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    def step_if(self, rate: float, finite: Tensor) -> None:
        """As ``step``, unless ``finite``, a number on the weights' device, is zero: decided there, without a wait."""
        held = [*self.parameters, *(t for slots in self.state.values() for n, t in slots.items() if n != "step")]
        before = [tensor.detach().clone() for tensor in held]
        self.step(rate)
        with torch.no_grad():
            for tensor, old in zip(held, before, strict=True):
                tensor.copy_(torch.where(finite.reshape(()) != 0, tensor, old))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the weights that have a gradient, at learning rate ``rate``."""
        config = self.config
        moved = {number: p for number, p in enumerate(self.parameters) if p.grad is not None}
        weights, gradients = list(moved.values()), [p.grad for p in moved.values() if p.grad is not None]
        common: dict[str, Any] = {"lr": rate, "weight_decay": config.l2, "maximize": False}
        if config.name == "sgd":
            sgd(weights, gradients, [None] * len(weights), momentum=0.0, dampening=0.0, nesterov=False, **common)
        elif config.name == "adagrad":
            steps, sums = self._slots(moved, "step", "sum")
            adagrad(weights, gradients, sums, steps, lr_decay=0.0, eps=config.eps, **common)
        else:
            if config.name == "adamw":
                common |= {"weight_decay": config.weight_decay, "decoupled_weight_decay": True}
            common |= {"beta1": config.beta1, "beta2": config.beta2, "eps": config.eps, "amsgrad": False}
            steps, first, second = self._slots(moved, "step", "exp_avg", "exp_avg_sq")
            adam(weights, gradients, first, second, [], steps, **common)

    def _slots(self, moved: dict[int, Tensor], *names: str) -> list[list[Tensor]]:
        """The weights' state by slot, zero where a weight moves for the first time."""
        for number in moved.keys() - self.state.keys():
            zeros = {name: torch.zeros_like(moved[number]) for name in names}
            # torch counts steps on the CPU, where reading them makes no one wait.
            self.state[number] = zeros | {"step": torch.tensor(0.0)}
        return [[self.state[number][name] for number in moved] for name in names]

    def restore(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Take over a checkpoint's ``state``."""
        self.state = {
            number: {name: slot if name == "step" else slot.to(self.parameters[number]) for name, slot in slots.items()}
            for number, slots in state.items()
        }
