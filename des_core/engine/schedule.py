"""The factor of both learning rates at a step: a warm-up, then a schedule.

    warm-up   t / w                                        steps t = 1 .. w
    cosine    (1 + cos(pi min(1, (t - w - 1) / d))) / 2    d steps down to 0, as torch's CosineAnnealingLR
    step      gamma ^ floor((t - w - 1) / d)               as torch's StepLR

It is a function of the step alone, so a run that was stopped goes on with the rates it would have had. Steps are those
of the run: one that goes on from a champion's weights begins anew.

Sources: Goyal et al., "Accurate, Large Minibatch SGD", 2017 (warm-up); Loshchilov and Hutter, "SGDR", ICLR 2017.
"""

from __future__ import annotations

import math

from des_core.config import TrainConfig


def rate_factor(settings: TrainConfig, step: int, steps: int) -> float:
    """The factor at a run's step, counted from 1, of ``steps`` in all its epochs."""
    warmup = settings.warmup_steps
    if step <= warmup:
        return step / warmup
    done = step - warmup - 1
    if settings.lr_schedule == "cosine":
        whole = settings.lr_decay_steps or max(steps - warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done / whole)))
    if settings.lr_schedule == "step":
        return float(settings.lr_gamma ** (done // settings.lr_decay_steps))
    return 1.0
