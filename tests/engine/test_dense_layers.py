"""Upper layers: torch's batch norm over the whole batch; dropout of fixed lanes; gradients by finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from des_core.config import MODELS, ModelConfig
from des_core.engine.dense_layers import GlobalBatchNorm, Home, LaneDropout, lane_edges
from des_core.engine.models import build
from des_core.engine.operators import Shard, totals_alone


def test_batch_norm_is_torchs() -> None:
    torch.manual_seed(0)
    mine, theirs = GlobalBatchNorm(4).double(), torch.nn.BatchNorm1d(4).double()
    for _ in range(5):
        x = torch.randn(9, 4, dtype=torch.float64) * 3 + 100
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = mine(a, Home(0, 9, 9, training=True)), theirs(b)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        (out * torch.arange(9)[:, None]).sum().backward()
        (expected * torch.arange(9)[:, None]).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8)
    theirs.eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(mine(x, Home(0, 3, 3)), theirs(x), rtol=1e-9, atol=1e-9)


def test_a_batch_of_one_uses_running_statistics() -> None:
    norm = GlobalBatchNorm(3)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(norm(x, Home(0, 1, 1, training=True)), norm(x, Home(0, 1, 1)))
    assert torch.equal(norm.mean_h, torch.zeros(3))


def test_dropout_is_the_same_for_any_cut_of_the_batch() -> None:
    layer = LaneDropout(0, 0.4)
    x = torch.ones(50, 7)
    whole = layer(x, Home(0, 50, 50, step=3, seed=8, lanes=16, training=True))
    for cuts in ([0, 25, 50], [0, 1, 2, 49, 50], [0, 50, 50]):
        parts = [
            layer(x[a:b], Home(a, b, 50, step=3, seed=8, lanes=16, training=True))
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        assert torch.equal(torch.cat(parts), whole)
    assert abs((whole == 0).float().mean() - 0.4) < 0.08
    assert not torch.equal(layer(x, Home(0, 50, 50, step=4, seed=8, lanes=16, training=True)), whole)
    assert torch.equal(layer(x, Home(0, 50, 50)), x)
    assert lane_edges(50, 16)[0] == 0 and lane_edges(50, 16)[-1] == 50


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradients_are_finite_differences(name: str, batch_norm: bool) -> None:
    """Rows and every dense tensor, 30 numbers of each, in double precision."""
    torch.manual_seed(2)
    fields, factors, samples, inputs = 4, 3, 6, 2
    config = ModelConfig(name=name, factors=factors, hidden=(5, 4), batch_norm=batch_norm, cross_rank=2)
    model = build(config, [f"f{number}" for number in range(fields)], inputs, seed=1).double()
    rows = torch.randn(9, model.row_width, dtype=torch.float64)
    inverse = torch.randint(0, 9, (samples * fields + 5,))
    sample = torch.cat([torch.arange(samples).repeat(fields), torch.randint(0, samples, (5,))])
    piece = torch.cat([torch.arange(fields).repeat_interleave(samples), torch.randint(0, fields, (5,))])
    x = torch.randn(len(sample), dtype=torch.float64)
    dense_BM = torch.randn(samples, inputs, dtype=torch.float64)
    labels = (torch.rand(samples) < 0.5).double()

    def loss(rows_UK: Tensor, *dense: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), dense, strict=True):
                parameter.copy_(value)
        shard = Shard(rows_UK, inverse, sample, piece, x, samples, torch.arange(fields), dense_BM)
        totals = totals_alone(model.by_name, shard)
        logits = model(totals, Home(0, samples, samples, training=True, inputs_BM=dense_BM))
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)

    dense = [p.detach().clone() for p in model.parameters()]
    leaf = rows.clone().requires_grad_()
    loss(leaf, *dense).backward()
    assert leaf.grad is not None
    analytic = [leaf.grad, *(p.grad for p in model.parameters())]
    for number, (start, gradient) in enumerate(zip([rows, *dense], analytic, strict=True)):
        assert gradient is not None
        for at in torch.randperm(start.numel())[:30].tolist():
            values = []
            for sign in (1, -1):
                moved = [tensor.clone() for tensor in [rows, *dense]]
                moved[number].view(-1)[at] += sign * 1e-6
                values.append(float(loss(moved[0], *moved[1:]).detach()))
            difference = (values[0] - values[1]) / 2e-6
            assert abs(difference - float(gradient.reshape(-1)[at])) < 1e-6, (number, at)
