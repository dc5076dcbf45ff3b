"""The dense weights' rule on a device is torch's, its state is a checkpoint of torch's, and a flag forbids it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from des_core.config import OptimizerConfig
from des_core.engine.weights.optimizer import DenseRule

RATES = (0.1, 0.1, 0.05, 0.02)


def settings(name: str) -> OptimizerConfig:
    extra: dict[str, Any] = {"weight_decay": 0.02} if name == "adamw" else {"l2": 0.03}
    return OptimizerConfig(name=name, learning_rate=0.1, **extra)  # type: ignore[arg-type]


def weights(device: torch.device) -> list[torch.Tensor]:
    """Weights of several shapes, one larger than a tile, one that never has a gradient."""
    draw = torch.Generator().manual_seed(1)
    shapes: tuple[tuple[int, ...], ...] = ((), (3,), (40, 30), (2, 3, 4))
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(device) for shape in shapes]


def gradients(step: int, device: torch.device) -> list[torch.Tensor | None]:
    draw = torch.Generator().manual_seed(step + 10)
    found = [torch.randn(w.shape, generator=draw, dtype=torch.float64).to(device) for w in weights(device)]
    return [*found[:3], None]


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "adamw"])
def test_the_rule_is_torchs(device: torch.device, name: str) -> None:
    from des_core.engine.device.batch import control_of
    from des_core.engine.device.dense_rule import DeviceDenseRule

    finite = torch.ones(1, dtype=torch.int32, device=device)
    theirs, ours = weights(device), weights(device)
    expected = DenseRule(settings(name), theirs)
    rule = DeviceDenseRule(settings(name), ours)
    for step, rate in enumerate(RATES):
        if step == 2:
            # As after a resumed run: with torch's own state.
            rule = DeviceDenseRule(settings(name), ours)
            rule.restore({n: {k: t.clone() for k, t in slots.items()} for n, slots in expected.state.items()})
        given = gradients(step, device)
        for weight, gradient in zip(theirs, given, strict=True):
            weight.grad = gradient
        expected.step(rate)
        flat = torch.cat([gradient.reshape(-1) for gradient in given if gradient is not None])
        control = control_of(0, 1, dense=rule.numbers(rate)).to(device)
        rule.update((0, 1, 2), flat, control, finite)
        for a, b in zip(theirs, ours, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert rule.state.keys() == expected.state.keys()
    for number, slots in expected.state.items():
        for slot, tensor in slots.items():
            assert torch.allclose(tensor, rule.state[number][slot], rtol=1e-12, atol=1e-12)
    before = [weight.clone() for weight in ours]
    rule.update((0, 1, 2), flat, control, finite * 0)
    assert all(torch.equal(a, b) for a, b in zip(before, ours, strict=True))


@pytest.mark.parametrize("rating", [False, True])
def test_losses_and_their_gradients_are_torchs(device: torch.device, rating: bool) -> None:
    from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

    from des_core.engine.device import row_kernels

    logits = torch.tensor([0.0, 3.0, -3.0, 40.0, -40.0, 800.0, -800.0, float("nan")], dtype=torch.float64)
    logits = logits.to(device).requires_grad_()
    labels = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 1], dtype=torch.float64, device=device)
    share = torch.tensor([0.125], dtype=torch.float64, device=device)
    rule = mse_loss if rating else binary_cross_entropy_with_logits
    expected = rule(logits, labels, reduction="none") * 0.125
    expected[:7].sum().backward()
    found, slope = torch.empty_like(labels), torch.empty_like(labels)
    row_kernels.losses[(1,)](logits.detach(), labels, found, slope, 8, share, RATING=rating, BLOCK=256)
    assert torch.allclose(found, expected.detach(), rtol=1e-12, atol=1e-15, equal_nan=True)
    assert logits.grad is not None and torch.allclose(slope[:7], logits.grad[:7], rtol=1e-12, atol=1e-15)
    finite = torch.ones(1, dtype=torch.int32, device=device)
    for mean, verdict in ((1.0, 1), (float("inf"), 0), (1.0, 0)):
        row_kernels.judge[(1,)](torch.tensor(mean, dtype=torch.float64, device=device), finite)
        assert int(finite) == verdict
