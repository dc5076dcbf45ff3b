"""How it is trained: [train]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from des_core import log
from des_core.config.section import EXPERT, NonNegative, Section

STEERING = (
    "batch",
    "shuffle",
    "early_stop",
    "lr_drop",
    "lr_schedule",
    "warmup_steps",
    "lr_decay_steps",
    "lr_gamma",
    "max_grad_norm",
    "precision",
    "payload",
    "lanes",
)
"""Keys of [train] that decide the weights at each step."""


class TrainConfig(Section):
    """How it is trained."""

    workers: int = Field(1, ge=1, description="Worker processes over which the model is spread.")
    batch: int = Field(1024, ge=1, description="Samples per step over all workers: the global batch.")
    epochs: int = Field(5, ge=1, description="Passes over the train part, at most; early_stop may end sooner.")
    max_steps: int = Field(0, ge=0, description="Stop after this many steps; 0: no limit.")
    shuffle: bool = Field(
        True, description="Train on the samples of each epoch in a new seeded order; false: in the stored order."
    )
    early_stop: Literal["metric", "none"] = Field(
        "metric",
        description="The valid part's metric, AUC for clicks and RMSE for ratings, decides when training stops, when "
        "learning rates drop and which epoch is best; none: nothing does.",
    )
    patience: int = Field(2, ge=1, description="Stop after this many epochs in a row without a better valid metric.")
    lr_drop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Multiply both learning rates by this after an epoch without a better valid metric.",
    )
    lr_schedule: Literal["constant", "cosine", "step"] = Field(
        "constant",
        description="Factor of both learning rates over the run's steps: constant; cosine: half a cosine from 1 to "
        "0 over lr_decay_steps; step: times lr_gamma after every lr_decay_steps.",
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Both learning rates rise linearly over the run's first so many steps; lr_schedule follows.",
    )
    lr_decay_steps: int = Field(
        0,
        ge=0,
        description="Steps of lr_schedule; 0, for cosine only: all steps of the run's epochs after the warm-up.",
    )
    lr_gamma: float = Field(0.1, gt=0, le=1, description="lr_schedule = 'step': factor after every lr_decay_steps.")
    max_grad_norm: NonNegative = Field(
        0.0,
        description="Scale the gradients of a step down so that their norm, over all rows and dense weights of all "
        "workers together, is at most this; 0: leave them.",
    )
    keep: Literal["best", "last"] = Field("best", description="The epoch whose weights are evaluated and registered.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the workers compute; auto: on GPUs where there are any."
    )
    precision: Literal["fp32", "fp64", "tf32", "bf16"] = Field(
        "fp32",
        description="Floating-point type of rows, activations and sums. tf32, bf16: fp32 with matrix products of "
        "numbers with 10 or 7 bits of mantissa; tf32 is for GPUs, elsewhere it is fp32.",
    )
    exchange: Literal["auto", "sum", "gather", "rows"] = Field(
        "auto",
        description="How partial results reach the home of their samples; auto: for each operator what is cheapest "
        "for all of them together.",
    )
    upper: Literal["auto", "home", "replicated"] = Field(
        "auto",
        description="Where the layers above the totals run: at each sample's home, or for all samples on every worker.",
        json_schema_extra=EXPERT,
    )
    payload: Literal["full", "bf16"] = Field(
        "full", description="How partial results travel: as they are computed, or in 16 bits (summed in fp32)."
    )
    bandwidth_mbps: NonNegative = Field(
        0.0,
        description="Bandwidth of each worker's link in Mbit/s that the plan reckons with; 0: measured when training "
        "starts.",
        json_schema_extra=EXPERT,
    )
    latency_us: NonNegative = Field(
        0.0,
        description="Latency of a collective in microseconds that the plan reckons with, if bandwidth_mbps is set.",
        json_schema_extra=EXPERT,
    )
    lanes: int = Field(
        64,
        ge=1,
        description="Fixed pieces of the batch, each with random numbers of its own for dropout, whatever the number "
        "of workers.",
        json_schema_extra=EXPERT,
    )
    kernels: Literal["torch", "triton"] = Field(
        "torch",
        description="On a GPU: torch's own operations with the ids on the CPU, or Triton kernels for ids and rows, "
        "which are tested but not yet measured.",
        json_schema_extra=EXPERT,
    )
    graphs: bool = Field(
        True,
        description="Capture a lone worker's steps in CUDA graphs, with kernels = triton; set it to false to look for "
        "a fault.",
        json_schema_extra=EXPERT,
    )
    checkpoint_steps: int = Field(
        0, ge=0, description="Write a checkpoint every so many steps; 0: at the end of each epoch only."
    )
    worker_memory_mb: int = Field(
        0,
        ge=0,
        description="Most MiB of memory that one worker may need, of all that des plan predicts; 0: no limit but that "
        "of cluster.memory, or of the machine.",
    )

    @model_validator(mode="after")
    def _schedule_has_steps(self) -> TrainConfig:
        if self.lr_schedule == "step" and not self.lr_decay_steps:
            raise ValueError("lr_schedule = 'step' needs lr_decay_steps, after so many of which rates are multiplied")
        if self.lr_schedule == "constant" and self.lr_decay_steps:
            raise ValueError("lr_decay_steps needs lr_schedule = 'cosine' or 'step'")
        return self

    @field_validator("early_stop", mode="before")
    @classmethod
    def _old_name(cls, value: object) -> object:
        if value != "auc":
            return value
        log.emit("renamed", key="train.early_stop", old="auc", new="metric")
        return "metric"
