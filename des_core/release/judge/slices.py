"""The bound on the test rows of single values of a field, as the workers compared them (engine/judging/slices.py)."""

from __future__ import annotations

from des_core.config import GateConfig
from des_core.verdict import Check, Comparison, Slice


def kept(bounds: GateConfig, found: Comparison) -> list[Slice]:
    """The slices of the fields in gate.slices, each with gate.slice_min_samples rows, by the bound."""
    return [
        Slice(**each.model_dump(), kept=each.low > -bounds.slice_max_auc_drop)
        for field in bounds.slices
        for each in found.slices.get(field, ())
        if each.samples >= bounds.slice_min_samples
    ]


def check(bounds: GateConfig, slices: list[Slice]) -> list[Check]:
    """One line for all slices that are kept, or one for each that is not."""
    beyond = [each for each in slices if not each.kept]
    worst = min(slices, key=lambda each: each.low, default=None)
    return [
        Check(
            name=f"slice_max_auc_drop {each.field}",
            value=each.low,
            bound=-bounds.slice_max_auc_drop,
            kept=each.kept,
            about=f"{each.field} = {each.value}: AUC differs by {each.difference:+.4f} (at least {each.low:+.4f}) on "
            f"{each.samples:,} rows, {'within' if each.kept else 'beyond'} "
            f"gate.slice_max_auc_drop = {bounds.slice_max_auc_drop:g}",
        )
        for each in beyond or ([worst] if worst else [])
    ]
