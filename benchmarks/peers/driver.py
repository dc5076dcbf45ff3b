"""One case from start to end: processes up, equality gate, interleaved blocks, what each round showed.

All systems' processes live side by side, idle but for the one whose block runs, and every block trains the same next
batches. The order turns by one each round, so that no system always follows the same other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import comparison, formulas
from benchmarks.peers.case import GATE_STEPS, Case
from benchmarks.peers.group import Group
from benchmarks.peers.links import Links
from benchmarks.peers.store import dense_file, unique_at_home, write_store
from benchmarks.peers.systems import SYSTEMS


def compare(case: Case, names: Sequence[str], data: Path, rounds: int, steps: int, say: Callable[[str], None]) -> Any:
    """What a case showed, as JSON.

    Args:
        names: systems beside DES.
        data: where stores are kept.
        rounds, steps: rounds of blocks, and steps of a block.
        say: is told what goes on.

    Raises:
        LinkError: the machine cannot make the link.
        GroupError: a process failed.
    """
    case = dataclasses.replace(case, batches=GATE_STEPS + rounds * steps)
    folder = write_store(case, data)
    with ExitStack() as stack:
        links = stack.enter_context(Links(case.link, case.workers))

        def start(name: str) -> Group:
            group = Group(name, case, folder, links)
            stack.callback(group.close)
            return group

        groups = {"des": start("des")}
        groups["des"].ready()
        # DES has left its first dense weights, so the others may start: all at once.
        groups |= {name: start(name) for name in ("reference", *names)}
        for name in ("reference", *names):
            groups[name].ready()
        deviations = _gate(groups, case.fill)
        say("deviation: " + " ".join(f"{name}={worst:.1e}" for name, worst in deviations.items()))
        groups.pop("reference").close()
        before = {name: group.do("facts") for name, group in groups.items()}
        blocks: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
        loads = []
        for number in range(rounds):
            turn = number % len(groups)
            for name in [*groups][turn:] + [*groups][:turn]:
                blocks[name].append(_block(groups[name], GATE_STEPS + number * steps, steps, case, links))
            loads.append(os.getloadavg()[0])
            say(f"round {number + 1} of {rounds}, load {loads[-1]:.1f}")
        after = {name: group.do("facts") for name, group in groups.items()}
    return {
        "case": dataclasses.asdict(case),
        "rounds": rounds,
        "steps": steps,
        "load": statistics.median(loads),
        "unique": unique_at_home(case, folder),
        "dense_weights": sum(weight.numel() for weight in torch.load(dense_file(case, folder)).values()),
        "systems": {
            name: {
                "deviation": deviations[name],
                "blocks": blocks[name],
                "before": before[name],
                "after": after[name],
            }
            for name in groups
        },
    }


def summary(result: Any) -> list[dict[str, Any]]:
    """A line per system: its rates and bytes, and how DES compares where both passed the gate."""
    systems = result["systems"]
    synchronous = {name: found["deviation"] for name, found in systems.items() if SYSTEMS[name].synchronous}
    passed = comparison.comparable(synchronous)
    return [_line(name, name in passed, result) for name in systems]


def _line(name: str, equal: bool, result: Any) -> dict[str, Any]:
    found, ours = result["systems"][name], result["systems"]["des"]["blocks"]
    blocks = found["blocks"]
    line: dict[str, Any] = {
        "system": name,
        "says": SYSTEMS[name].says,
        "deviation": found["deviation"],
        "equal": equal,
        "peak_bytes": sum(worker["peak_bytes"] for worker in found["after"]),
        **_bytes(name, result),
    }
    for what in ("samples_per_s", "cpu_ms_per_sample"):
        line[what] = statistics.median(block[what] for block in blocks)
        rounds = ([block[what] for block in part] for part in (ours, blocks))
        line[f"des_{what}"] = dataclasses.asdict(comparison.ratio(*rounds)) if equal and name != "des" else None
    return line


def _bytes(name: str, result: Any) -> dict[str, float | None]:
    """Bytes per worker and step: counted at the interface, in DES's ledger, computed, and the least of the kind."""
    found = result["systems"][name]
    interface = statistics.fmean(block["interface_bytes"] for block in found["blocks"])
    counted: dict[str, float | None] = {"interface_bytes": None if math.isnan(interface) else interface}
    if name == "des":
        steps = result["rounds"] * result["steps"]
        both = list(zip(found["before"], found["after"], strict=True))
        ledger = [sum(after["sent_bytes"].values()) - sum(before["sent_bytes"].values()) for before, after in both]
        counted["ledger_bytes"] = statistics.fmean(ledger) / steps
        counted["computed_bytes"] = counted["least_bytes"] = sum(found["after"][0]["planned_bytes"].values())
        return counted
    case = Case(**result["case"] | {"hidden": tuple(result["case"]["hidden"])})
    facts = (name, case, result["unique"], result["dense_weights"])
    return counted | {
        "ledger_bytes": None,
        "computed_bytes": formulas.computed(*facts),
        "least_bytes": formulas.least(*facts),
    }


def _gate(groups: dict[str, Group], fill: bool) -> dict[str, float]:
    """How far each system is from the reference after the first steps."""
    if fill:
        groups["des"].do("fill")
    logits = {}
    for name, group in groups.items():
        group.do("train", first=0, count=GATE_STEPS)
        logits[name] = list(itertools.chain.from_iterable(group.do("score")))
    return {name: comparison.deviation(found, logits["reference"]) for name, found in logits.items()}


def _block(group: Group, first: int, count: int, case: Case, links: Links) -> dict[str, float]:
    """One block: from the first worker's start to the last one's end, and everybody's CPU time."""
    before = group.do("sent")
    answers = group.do("train", first=first, count=count)
    after = group.do("sent")
    seconds = max(answer["stop"] for answer in answers) - min(answer["start"] for answer in answers)
    cpu_s = sum(answer["cpu_s"] for answer in answers)
    # One loopback serves all workers; a cable is a worker's own.
    sent = [b - a for a, b in zip(before, after, strict=True)]
    per_worker = statistics.fmean(sent) if links.shaped else sent[0] / group.workers
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "samples_per_s": count * case.batch / seconds,
        "cpu_ms_per_sample": 1000 * cpu_s / (count * case.batch),
        "interface_bytes": per_worker / count,
    }
