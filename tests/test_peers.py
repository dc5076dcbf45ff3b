"""What the comparison stands on: formulas that the ledger confirms, a gate that refuses, ratios with their spread."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from benchmarks.peers import comparison, formulas
from benchmarks.peers.case import EPS, GATE_STEPS, ROWS_RATE, Case, Part
from benchmarks.peers.driver import summary
from benchmarks.peers.group import Group
from benchmarks.peers.head import Head, update_rows
from benchmarks.peers.links import Links
from benchmarks.peers.report import table
from benchmarks.peers.store import dense_file, write_store
from benchmarks.peers.systems import plain

ROOT = Path(__file__).parent.parent
TINY = Case(model="deepfm", hidden=(6, 4), factors=4, fields=4, table_rows=50, batch=48, workers=2, batches=GATE_STEPS)
WEIGHTS = 1 + (4 * 4 * 6 + 6) + (6 * 4 + 4) + 4
"""Dense weights of TINY: bias, two layers, output."""


@pytest.fixture
def plain_logits(tmp_path: Path) -> Callable[[], list[float]]:
    """Trains the reference anew, and tells its logits."""
    folder = write_store(TINY, tmp_path)
    torch.manual_seed(1)
    torch.save(Head(TINY).state_dict(), dense_file(TINY, folder))

    def logits() -> list[float]:
        system = plain.build(TINY, folder, 0, 1)
        system.train(0, GATE_STEPS)
        found: list[float] = system.score().tolist()
        return found

    return logits


def test_the_gate_sees_a_learning_rate_one_percent_off(
    plain_logits: Callable[[], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = plain_logits()
    assert comparison.deviation(plain_logits(), right) == 0
    monkeypatch.setattr("benchmarks.peers.head.ROWS_RATE", ROWS_RATE * 1.01)
    assert comparison.deviation(plain_logits(), right) > comparison.TOLERANCE


@pytest.mark.parametrize("wrong", [[1.0, 2.0], [1.0, 2.0, math.nan], [1.0, 2.0, math.inf]])
def test_no_number_is_infinitely_wrong(wrong: list[float]) -> None:
    assert comparison.deviation(wrong, [1.0, 2.0, 3.0]) == math.inf


def test_who_may_be_compared() -> None:
    assert comparison.comparable({"des": 1e-6, "sparse": 1e-6, "server": 1e-3}) == ["des", "sparse"]
    assert comparison.comparable({"des": 1e-3, "sparse": 1e-6}) == []


def result(**deviations: float) -> dict[str, object]:
    """A case in which every system's rounds took 1, 2 and 4 seconds, and others' twice that."""
    facts = {"peak_bytes": 1e6, "sent_bytes": {"fm": 0.0}, "planned_bytes": {"fm": 8.0}}
    systems = {}
    for name, deviation in deviations.items():
        slow = 1 if name == "des" else 2
        blocks = [
            {"samples_per_s": 1 / s / slow, "cpu_ms_per_sample": s * slow, "interface_bytes": math.nan}
            for s in (1, 2, 4)
        ]
        systems[name] = {"deviation": deviation, "blocks": blocks, "before": [facts], "after": [facts]}
    case = json.loads(str(TINY))
    return {"case": case, "rounds": 3, "steps": 1, "load": 0.0, "unique": 10.0, "dense_weights": 5, "systems": systems}


def test_no_ratio_with_a_system_that_differs_or_need_not_agree() -> None:
    shown = result(des=1e-6, sparse=1e-6, server=1e-3, server_async=0.0)
    lines = {line["system"]: line for line in summary(shown)}
    assert lines["sparse"]["des_samples_per_s"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert lines["sparse"]["des_cpu_ms_per_sample"]["median"] == 0.5
    assert not any(lines[name]["des_samples_per_s"] for name in ("des", "server", "server_async"))
    text = table(shown).splitlines()
    assert [("NOT EQUAL" in line) for line in text] == [False, False, False, True, True]


def test_a_ratio_is_taken_within_rounds() -> None:
    # The machine was three times slower in the second round; both systems felt it.
    assert comparison.ratio([10, 30, 10], [5, 15, 4]) == comparison.Ratio(2.0, 2.0, 2.5)


def test_crossover() -> None:
    assert comparison.crossover([1, 100], [4, 0.25]) == pytest.approx(10)
    assert comparison.crossover([1, 2, 4], [0.5, 1.0, 2.0]) == pytest.approx(2)
    assert comparison.crossover([1, 2, 4], [1.5, 1.2, 1.1]) is None


def test_a_padded_table_steps_like_a_narrow_one() -> None:
    """FBGEMM takes the mean of squares over padded columns; Part.scale undoes it."""
    case, part = Case(model="lr", factors=1), Part("w", 1)
    gradient_U1 = torch.tensor([[0.3], [-2.0]], dtype=torch.float64)
    narrow_R1, state_R1 = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    padded_R1, mean_R1 = torch.zeros_like(narrow_R1), torch.zeros_like(narrow_R1)
    for _ in range(3):
        update_rows(case, narrow_R1, state_R1, torch.arange(2), gradient_U1)
        mean_R1 += gradient_U1.square() / part.padded
        padded_R1 -= ROWS_RATE * part.scale * gradient_U1 / (mean_R1.sqrt() + EPS * part.scale)
    assert torch.allclose(narrow_R1, padded_R1, rtol=1e-12)


def test_ledger_agrees_with_formulas(tmp_path: Path) -> None:
    """Every byte that DES books in two real processes is in the formulas, by sum and by gather."""
    width, numbers = 1 + TINY.factors + TINY.hidden[0], TINY.fields * TINY.factors
    rows = {
        "sum": formulas.by_sum(2, TINY.home, width),
        "gather": formulas.by_gather(2, TINY.home, numbers) + formulas.by_sum(2, TINY.home, 1),
    }
    cases = {exchange: Case(**{**vars(TINY), "exchange": exchange}) for exchange in rows}
    folder = write_store(TINY, tmp_path)
    with ExitStack() as stack:
        links = stack.enter_context(Links("loopback", 2))
        groups = {exchange: Group("des", case, folder, links) for exchange, case in cases.items()}
        for group in groups.values():
            stack.callback(group.close)
        for exchange, group in groups.items():
            group.ready()
            group.do("train", first=0, count=3)
            sent = [sum(facts["sent_bytes"].values()) / 3 for facts in group.do("facts")]
            # One number more: the mean loss.
            assert sent == [rows[exchange] + formulas.dense_gradients(2, WEIGHTS + 1)] * 2


def test_command_line(tmp_path: Path) -> None:
    """From data to results.json, with a peer that torch itself brings."""
    size = ["--factors", "4", "--fields", "4", "--table-rows", "50", "--batch", "48", "--rounds", "3", "--steps", "2"]
    words = ["--models", "fm", *size, "--systems", "server", "server_async", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "peers.py"), *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = json.loads((tmp_path / "results.json").read_text())["results"]
    lines = {line["system"]: line for line in summary(found)}
    assert lines["server"]["equal"] and not lines["server_async"]["equal"]
    assert lines["server"]["des_samples_per_s"]["median"] > 0
    assert lines["des"]["ledger_bytes"] == lines["des"]["computed_bytes"]
    assert (tmp_path / "bytes-by-workers.svg").exists()
