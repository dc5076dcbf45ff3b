"""The model's first bias: with all else near zero it alone is the prediction, so it starts at the labels' mean.

    click    log(p / (1 - p)),  p the share of clicks in the training part
    rating   the mean rating of the training part

A bias of zero predicts one click in two; where clicks are rare the first steps of all other weights would go into
unlearning that. The labels are read once, a share of them by each worker, and their sums are added chunk by chunk in
one order, so the bias has the same bits for any number of workers.

Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, section 4.1; He et al., "Practical Lessons from
Predicting Clicks on Ads at Facebook", ADKDD 2014, on normalised entropy.
"""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import torch

from des_core.contracts import LABEL, Dataset, Reference
from des_core.data.feed.batches import Stream
from des_core.engine.exchange.collectives import Collectives

CHUNKS = 1024
"""Pieces of the training part whose sums are kept apart until all are there."""


def first_bias(reference: Reference, dataset: Dataset, peers: Collectives) -> float:
    """The bias that predicts the mean label of the training part; all workers call it.

    Where all labels are alike, half a sample is taken for one of the other kind: log odds stay finite.
    """
    samples = dataset.rows("train")
    if not samples:
        return 0.0
    total = _sum_of_labels(reference, samples, peers)
    if dataset.task == "rating":
        return total / samples
    clicks = min(max(total, 0.5), samples - 0.5)
    return math.log(clicks / (samples - clicks))


def _sum_of_labels(reference: Reference, samples: int, peers: Collectives) -> float:
    size = -(-samples // CHUNKS)
    chunks = -(-samples // size)
    first, stop = (worker * chunks // peers.workers for worker in (peers.rank, peers.rank + 1))
    sums = torch.zeros(chunks, dtype=torch.float64)
    if first < stop:
        batches = Stream(reference, "train", [LABEL]).batches(size, cursor=first * size)
        for chunk, batch in enumerate(islice(batches, stop - first), first):
            sums[chunk] = float(batch.column(LABEL).to_numpy().sum(dtype=np.float64))
    with peers.uncounted():
        return math.fsum(peers.all_reduce({"labels": sums.to(peers.device)})["labels"].tolist())
