"""Update rules: for the rows a batch touched, and for the dense weights.

Every row has one owner, which sees the summed gradient of the whole batch, so any rule that looks
at one row is exactly the single-machine rule. The law is the lazy one: rows not touched keep value and
state; Adam corrects its bias by the global step, as torch.optim.SparseAdam. With G = gradient + l2 w::

    sgd              w -= lr G
    adagrad          s += G^2;  w -= lr G / (sqrt(s) + eps)
    rowwise_adagrad  the same with one s for w and one, the mean of G^2, for v_1..v_k
    adam             m += (1-b1)(G-m);  n += (1-b2)(G^2-n);  w -= lr sqrt(1-b2^t)/(1-b1^t) m / (sqrt(n) + eps)
    adamw            w *= 1 - lr weight_decay, then adam

Sources: Duchi et al., JMLR 2011; Kingma and Ba, ICLR 2015; Loshchilov and Hutter, ICLR 2019;
row-wise: Gupta et al., "Training recommender systems at scale", arXiv 2019.
Dims: U rows touched, K numbers per row, Z numbers of state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from des_core.config import OptimizerConfig


def state_width(rule: str, width: int) -> int:
    """Numbers of state per row, Z, for rows of ``width`` numbers."""
    return {"sgd": 0, "adagrad": width, "rowwise_adagrad": min(width, 2)}.get(rule, 2 * width)


def update_rows(
    config: OptimizerConfig, rows_UK: Tensor, gradient_UK: Tensor, state_UZ: Tensor, step: int, rate: float
) -> tuple[Tensor, Tensor]:
    """New rows [U, K] and state [U, Z] after global step ``step`` (from 1) at learning rate ``rate``."""
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
        rate_UK = torch.cat([rate_UZ[:, :1], rate_UZ[:, 1:].expand(-1, rows_UK.shape[1] - 1)], 1)
        return rows_UK - rate_UK * gradient_UK, state_UZ
    width = rows_UK.shape[1]
    first_UK, second_UK = state_UZ[:, :width], state_UZ[:, width:]
    first_UK = torch.lerp(first_UK, gradient_UK, 1 - config.beta1)
    second_UK = torch.lerp(second_UK, gradient_UK.square(), 1 - config.beta2)
    if config.weight_decay:
        rows_UK = rows_UK * (1 - rate * config.weight_decay)
    scale: float = rate * (1 - config.beta2**step) ** 0.5 / (1 - config.beta1**step)
    moved_UK = rows_UK - scale * first_UK / (second_UK.sqrt() + config.eps)
    return moved_UK, torch.cat([first_UK, second_UK], 1)


def dense_optimizer(config: OptimizerConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """torch's own rule; l2 is its coupled weight_decay (adamw: its decoupled one)."""
    rate, l2, eps = config.learning_rate, config.l2, config.eps
    betas = (config.beta1, config.beta2)
    choices: dict[str, Any] = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=rate, weight_decay=l2),
        "adagrad": lambda: torch.optim.Adagrad(parameters, lr=rate, weight_decay=l2, eps=eps),
        "adam": lambda: torch.optim.Adam(parameters, lr=rate, weight_decay=l2, betas=betas, eps=eps),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=rate, weight_decay=config.weight_decay, betas=betas, eps=eps),
    }
    optimizer: torch.optim.Optimizer = choices[config.name]()
    return optimizer
