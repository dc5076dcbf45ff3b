"""Operator laws: any split over workers, by any exchange, is the dense layer, in value and in gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from des_core.engine.operators import (
    attention,
    bilinear,
    cross,
    cross_v2,
    fc,
    fm,
    fwfm,
    gated_streams,
    inner_product,
    lr,
    mask_blocks,
)
from tests.engine.cases import FACTORS, build_operator, operator_data
from tests.engine.group import Group

OWNERS = [0, 1, 2, 3, 4, 5, 6, 0]
ALL_AT_FIRST = [0, 0, 0, 0, 0, 0, 0, 0]
SUMS = ["lr", "fm", "fc", "cross", "cross stacked", "cross v2", "gated cross", "streams", "streams by fields"]
ALONE = ["cross v2 full", "gated cross full", "fwfm", "products", "attention", "masks", "masks stacked", "bilinear"]
NAMES = [*SUMS, *ALONE]
KINDS = {
    "sum": SUMS,
    "gather": [name for name in NAMES if name != "lr"],
    "rows": NAMES,
    "replicated": SUMS,
}


def published(name: str, x_BF: Tensor, rows_FK: Tensor, inputs_BM: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The layer as its paper writes it, on one worker and without any trick."""
    w_F, v_Fk = rows_FK[:, 0], rows_FK[:, 1:]
    vectors_BFk = x_BF[:, :, None] * v_Fk
    x0_BD = torch.cat([vectors_BFk.flatten(1), inputs_BM], 1)

    def whole(key: str) -> Tensor:
        return torch.cat([weights[f"{key}.weight_FkP"].flatten(0, 1), weights[f"{key}.weight_MP"]])

    if name == "lr":
        return lr.reference(x_BF, w_F)
    if name == "fm":
        return fm.reference(x_BF, w_F, v_Fk)
    if name == "fwfm":
        return fwfm.reference(x_BF, w_F, v_Fk, weights["strength_FF"])
    if name == "fc":
        return fc.reference(x0_BD, whole("first")) + weights["bias_h"]
    if name.startswith("gated cross"):
        layers = range(3)
        shifts = torch.stack([whole(f"shifts.{layer}")[:, 0] for layer in layers])
        if name == "gated cross full":
            both = torch.stack([weights[f"full.{layer}.weight"] for layer in layers]).chunk(2, 1)
        else:
            halves = [(whole(f"up.{n}").split(2, 1), whole(f"down.{n}").split(2, 1)) for n in layers]
            both = tuple(torch.stack([up[half] @ down[half].T for up, down in halves]) for half in (0, 1))
        return cross_v2.gated_reference(x0_BD, *both, shifts, whole("top")) + weights["bias_h"]
    if name.startswith("streams"):
        gates = [whole(f"shift.{stream}")[:, 0] for stream in (0, 1)]
        for stream, context in enumerate(((1,), (6, 2)) if name == "streams by fields" else ()):
            down_Ck = weights[f"context.{stream}.down.weight_FkP"]
            z_Bq = sum((vectors_BFk[:, field] @ down_Ck[n] for n, field in enumerate(context)), start=torch.tensor(0.0))
            hidden_Bq = torch.relu(z_Bq + weights[f"context.{stream}.bias_q"])
            gates[stream] = gates[stream] + hidden_Bq @ whole(f"context.{stream}.up").T
        return gated_streams.reference(x0_BD, gates, [whole("first.0"), whole("first.1")]) + weights["bias_P"]
    if name.startswith("masks"):
        normed = [
            mask_blocks.reference(vectors_BFk[:, f]) * weights["gain_Fk"][f] + weights["shift_Fk"][f]
            for f in range(vectors_BFk.shape[1])
        ]
        e_BD, outputs = torch.cat([*normed, inputs_BM], 1), []
        for n in (0, 1):
            w = {key: weights[f"blocks.{n}.{key}"] for key in ("aggregate.weight", "aggregate.bias", "project.weight")}
            mask = torch.relu(x0_BD @ w["aggregate.weight"].T + w["aggregate.bias"]) @ w["project.weight"].T
            mask = mask + weights[f"blocks.{n}.project.bias"]
            out = mask_blocks.reference((mask * e_BD) @ weights[f"blocks.{n}.output.weight"].T)
            outputs.append(torch.relu(out * weights[f"blocks.{n}.norm.weight"] + weights[f"blocks.{n}.norm.bias"]))
            e_BD = outputs[-1] if name == "masks stacked" else e_BD
        return outputs[-1] if name == "masks stacked" else torch.cat(outputs, 1)
    if name == "bilinear":
        e_BVk = torch.cat([vectors_BFk, inputs_BM[:, :, None] * weights["inputs_Mk"]], 1)
        z_BV = torch.relu(torch.relu(e_BVk.mean(2) @ weights["squeeze.weight"].T) @ weights["excite.weight"].T)
        both = [bilinear.reference(e, weights["weight_Vkk"]) for e in (e_BVk, z_BV[:, :, None] * e_BVk)]
        return torch.cat([lr.reference(x_BF, w_F)[:, None], *both], 1)
    if name.startswith("cross v2"):
        layers = range(3)
        shifts = torch.stack([whole(f"shifts.{layer}")[:, 0] for layer in layers])
        if name == "cross v2 full":
            up = torch.stack([weights[f"full.{layer}.weight"] for layer in layers])
            down = torch.eye(up.shape[1], dtype=up.dtype).expand_as(up)
        else:
            up, down = (torch.stack([whole(f"{key}.{layer}") for layer in layers]) for key in ("up", "down"))
        return cross_v2.reference(x0_BD, down, up, shifts, whole("top")) + weights["bias_h"]
    if name.startswith("cross"):
        return cross.reference(x0_BD, whole("first")[:, :4].T, weights["bias_LD"], whole("first")[:, 4:])
    if name == "products":
        z_Bk = inputs_BM
        for layer in ("bottom.0", "bottom.2"):
            z_Bk = torch.relu(z_Bk @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
        return torch.cat([z_Bk, inner_product.reference(torch.cat([vectors_BFk, z_Bk[:, None]], 1))], 1)
    e_BVk = torch.cat([vectors_BFk, inputs_BM[:, :, None] * weights["inputs_Mk"]], 1)
    for layer in range(2):
        e_BVk = attention.reference(e_BVk, weights[f"layers.{layer}.weight"], heads=2)
    return (e_BVk.flatten(1) @ weights["output.weight"].T)[:, 0]


def dense(name: str, samples: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The published layer's output, gradient of rows and of dense weights, on the workers' numbers."""
    rows_FK, x_BF, inputs_BM = operator_data(samples, len(OWNERS))
    rows_FK.requires_grad_()
    weights = dict(build_operator(name, len(OWNERS)).named_parameters())
    output = published(name, x_BF, rows_FK, inputs_BM, weights)
    weights_B = torch.cos(torch.arange(samples, dtype=torch.float64))
    (output.reshape(samples, -1).sum(1) * weights_B).sum().backward()
    assert rows_FK.grad is not None and rows_FK.shape[1] == 1 + FACTORS
    return output.detach(), rows_FK.grad, {k: p.grad for k, p in weights.items() if p.grad is not None}


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names])
def test_any_split_is_the_published_layer(group: Callable[[int], Group], name: str, kind: str, workers: int) -> None:
    # 10 samples are uneven over 3, 4 and 7 homes; 5 leave two of 7 workers without any.
    for samples, owners in ((10, OWNERS), (5, OWNERS), (10, ALL_AT_FIRST)):
        output, rows, weights = dense(name, samples)
        answers = group(workers).do("operator", name=name, kind=kind, samples=samples, owners=owners)
        pieces = [torch.tensor(answer["output"], dtype=torch.float64) for answer in answers]
        slices = [piece.reshape(-1, *output.shape[1:]) for piece in pieces]
        for whole in slices if kind == "replicated" else [torch.cat(slices)]:
            torch.testing.assert_close(whole.view_as(output), output, rtol=1e-11, atol=1e-11)
        for answer in answers:
            for field, gradient in answer["rows"].items():
                found = torch.tensor(gradient, dtype=torch.float64)
                torch.testing.assert_close(found, rows[int(field)], rtol=1e-10, atol=1e-10)
        for key, expected in weights.items():
            parts = [torch.tensor(a["dense"][key], dtype=torch.float64) for a in answers if key in a["dense"]]
            torch.testing.assert_close(torch.stack(parts).sum(0), expected, rtol=1e-10, atol=1e-10)
