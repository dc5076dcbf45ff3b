"""How it is trained: [train]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from des_core.config.section import NonNegative, Section

STEERING = ("batch", "shuffle", "early_stop", "lr_drop", "precision", "payload", "lanes")
"""Keys of [train] that decide the weights at each step."""


class TrainConfig(Section):
    """How it is trained."""

    workers: int = Field(1, ge=1, description="Processes the model is spread over.")
    batch: int = Field(1024, ge=1, description="Samples per step over all workers: the global batch.")
    epochs: int = Field(5, ge=1, description="Passes over the train part, at most: see early_stop.")
    max_steps: int = Field(0, ge=0, description="Stop after this many steps; 0: no limit.")
    shuffle: bool = Field(True, description="A new seeded order each epoch; false: the stored order.")
    early_stop: Literal["auc", "none"] = Field("auc", description="What decides patience, lr_drop and keep = best.")
    patience: int = Field(2, ge=1, description="Stop after this many epochs in a row without a better valid metric.")
    lr_drop: float = Field(
        1.0, gt=0, le=1, description="Factor of both learning rates after an epoch without a better valid metric."
    )
    keep: Literal["best", "last"] = Field("best", description="The epoch whose weights are evaluated.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    precision: Literal["fp32", "fp64"] = Field("fp32", description="Of rows, activations and payloads.")
    exchange: Literal["auto", "sum", "gather", "rows"] = Field(
        "auto", description="How partial results meet; auto: each operator's, chosen jointly as the cheapest plan."
    )
    upper: Literal["auto", "home", "replicated"] = Field(
        "auto", description="What follows a total runs at each sample's home, or for all samples on every worker."
    )
    payload: Literal["full", "bf16"] = Field(
        "full", description="Numbers of partial results on the wire: as computed, or 16 bits (summed in fp32)."
    )
    bandwidth_mbps: NonNegative = Field(
        0.0, description="Of each worker's link, for the plan; 0: measured when training starts."
    )
    latency_us: NonNegative = Field(0.0, description="Of one collective, for the plan; read if bandwidth_mbps is set.")
    lanes: int = Field(64, ge=1, description="Fixed pieces of the batch that key dropout, whatever the workers.")
    checkpoint_steps: int = Field(0, ge=0, description="A checkpoint every so many steps; 0: each epoch only.")
    worker_memory_mb: int = Field(0, ge=0, description="Most row memory per worker that placement allows; 0: any.")
