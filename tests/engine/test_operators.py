"""Operator laws: any split over workers is the dense layer, in value and in gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from des_core.engine.operators import fc, fm, lr
from tests.engine.group import Group

OWNERS = [0, 1, 2, 3, 4, 5, 6, 0]
ALL_AT_FIRST = [0, 0, 0, 0, 0, 0, 0, 0]
FACTORS = 3


def dense(name: str, samples: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Reference output, gradient of rows and of dense weights, on the same random numbers as the workers'."""
    fields = len(OWNERS)
    generator = torch.Generator().manual_seed(samples * 100 + fields)
    rows_FK = torch.randn(fields, 1 + FACTORS, generator=generator, dtype=torch.float64).requires_grad_()
    x_BF = torch.randn(samples, fields, generator=generator, dtype=torch.float64)
    torch.manual_seed(3)
    layer = fc.FullyConnected(fields, FACTORS, 5, bias=True).double()
    if name == "lr":
        output = lr.reference(x_BF, rows_FK[:, 0])
    elif name == "fm":
        output = fm.reference(x_BF, rows_FK[:, 0], rows_FK[:, 1:])
    else:
        pooled_BFk = x_BF[:, :, None] * rows_FK[None, :, 1:]
        output = fc.reference(pooled_BFk, layer.weight_Fkh) + layer.bias_h
    weights_B = torch.cos(torch.arange(samples, dtype=torch.float64))
    (output.reshape(samples, -1).sum(1) * weights_B).sum().backward()
    assert rows_FK.grad is not None
    return output.detach(), rows_FK.grad, {k: p.grad for k, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kind", ["sum", "gather"])
@pytest.mark.parametrize("name", ["lr", "fm", "fc"])
def test_any_split_is_the_dense_layer(group: Callable[[int], Group], name: str, kind: str, workers: int) -> None:
    # 10 samples are uneven over 3, 4 and 7 homes; 5 leave two of 7 workers without any.
    for samples, owners in ((10, OWNERS), (5, OWNERS), (10, ALL_AT_FIRST)):
        output, rows, weights = dense(name, samples)
        answers = group(workers).do("operator", name=name, kind=kind, samples=samples, owners=owners)
        home = [torch.tensor(answer["output"], dtype=torch.float64) for answer in answers]
        split = torch.cat([piece.reshape(-1, *output.shape[1:]) for piece in home])
        torch.testing.assert_close(split, output, rtol=1e-12, atol=1e-12)
        for answer in answers:
            for field, gradient in answer["rows"].items():
                expected = rows[int(field)]
                torch.testing.assert_close(
                    torch.tensor(gradient, dtype=torch.float64), expected, rtol=1e-11, atol=1e-11
                )
        for key, expected in weights.items():
            parts = [torch.tensor(a["dense"][key], dtype=torch.float64) for a in answers if key in a["dense"]]
            torch.testing.assert_close(torch.stack(parts).sum(0), expected, rtol=1e-11, atol=1e-11)
