"""Update rules: [optimizer.rows] and [optimizer.dense]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from des_core.config.section import NonNegative, Positive, Section


class OptimizerConfig(Section):
    """An update rule."""

    name: Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "adamw", "ftrl", "group_ftrl"] = Field(
        "adam", description="Update rule; rowwise_adagrad, ftrl and group_ftrl are for rows only."
    )
    learning_rate: Positive = Field(0.001, description="Learning rate.")
    l2: NonNegative = Field(
        0.0,
        description="L2 regularisation: adds l2 times the weight to its gradient, of rows only in steps that "
        "look them up; ftrl, group_ftrl: the l2 of their closed form.",
    )
    l1: NonNegative = Field(0.0, description="ftrl, group_ftrl: L1 regularisation, which sets single weights to zero.")
    group_l1: NonNegative = Field(0.0, description="group_ftrl: group lasso, which sets whole rows to zero.")
    ftrl_beta: NonNegative = Field(
        1.0, description="ftrl, group_ftrl: beta in the rate alpha / (beta + sqrt(n)) of each weight."
    )
    weight_decay: NonNegative = Field(
        0.0, description="adamw: decoupled weight decay; a step takes learning rate times this share off each weight."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="adam, adamw: decay rate of the moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="adam, adamw: decay rate of the moment.")
    eps: Positive = Field(
        1e-8, description="adagrad, rowwise_adagrad, adam, adamw: added to the denominator, so that it is never zero."
    )

    @model_validator(mode="after")
    def _decay_fits(self) -> OptimizerConfig:
        if self.weight_decay and self.name != "adamw":
            raise ValueError(f"weight_decay needs name = 'adamw' (it is {self.name!r}); or use l2")
        if self.weight_decay * self.learning_rate >= 1:
            raise ValueError("learning_rate * weight_decay must be below 1: each step would take more than the weight")
        if self.l1 and self.name not in ("ftrl", "group_ftrl"):
            raise ValueError(f"l1 needs name = 'ftrl' or 'group_ftrl' (it is {self.name!r})")
        if self.group_l1 and self.name != "group_ftrl":
            raise ValueError(f"group_l1 needs name = 'group_ftrl' (it is {self.name!r})")
        return self


class RowOptimizerConfig(OptimizerConfig):
    """How rows are updated; each is read by few samples of a batch, so its learning rate is larger."""

    learning_rate: Positive = Field(0.01, description="Learning rate.")


class OptimizersConfig(Section):
    """Rows and dense weights are updated by their own rules."""

    rows: RowOptimizerConfig = Field(RowOptimizerConfig(), description="How the tables' rows are updated.")
    dense: OptimizerConfig = Field(OptimizerConfig(), description="How the dense layers are updated.")

    @model_validator(mode="after")
    def _dense_has_no_rows(self) -> OptimizersConfig:
        if self.dense.name in ("rowwise_adagrad", "ftrl", "group_ftrl"):
            raise ValueError(f"dense.name = {self.dense.name!r} is for rows: use adagrad")
        return self
