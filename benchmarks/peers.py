"""How fast is DES beside what people use today, where does it win, and where does it lose?

    make bench                                            installs the peers and runs --quick
    python benchmarks/peers.py --quick                    about five minutes on two cores
    python benchmarks/peers.py --sweep                    an hour: one thing varied at a time
    python benchmarks/peers.py --marks                    full size: 26 fields of 1M rows
    python benchmarks/peers.py --models fm deepfm --hidden 64 --links loopback 1gbit --workers 2 4

Every option takes several values, and each combination is a case. A case first holds every system against a plain
torch reference after 20 steps; one that differs is shown, but no ratio is formed with it. What is the same for all,
what is inside the clock, and what each exchange must send is said in benchmarks/peers/{store,driver,formulas}.py.
Prints a table per case and where along an axis the winner changes; writes results.json and pictures under --out.

Needs benchmarks/requirements.txt (`make bench`); systems that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.case import MODELS, Case
from benchmarks.peers.driver import compare
from benchmarks.peers.figures import draw
from benchmarks.peers.group import GroupError
from benchmarks.peers.links import RATES, LinkError
from benchmarks.peers.report import crossovers, table, title
from benchmarks.peers.systems import SYSTEMS

PEERS = [name for name in SYSTEMS if name not in ("des", "reference")]
SLOW_STEPS = 4
"""Steps of a block on links of 100 Mbit/s and less."""

QUICK = ["--models", "fm", "deepfm", "--hidden", "64", "--table-rows", "50000", "--batch", "2048", "--steps", "5"]
QUICK += ["--links", "loopback", "100mbit"]
BASE = ["--table-rows", "200000", "--batch", "8192"]
SWEEP = (
    ["--models", "lr", "fm", "dcn", "dlrm", "--hidden", "64"],
    ["--models", "deepfm", "--hidden", "32", "64", "256"],
    ["--models", "fm", "deepfm", "--hidden", "64", "--links", "1gbit", "100mbit"],
    ["--models", "deepfm", "--hidden", "64", "--factors", "64"],
    ["--models", "deepfm", "--hidden", "64", "--fields", "100"],
    ["--models", "wide_deep", "--hidden", "64", "--bag", "1", "10"],
    ["--models", "deepfm", "--hidden", "64", "--zipf", "0.8", "1.3"],
    ["--models", "fm", "deepfm", "--hidden", "64", "--workers", "4"],
    ["--models", "fm", "deepfm", "--hidden", "64", "--workers", "4", "--batch", "16384"],
)
"""One thing varied at a time around deepfm-64 on two workers, loopback; four at one global and one local batch."""

ONE = ["--models", "deepfm", "--hidden", "256", "--workers", "1", "--batch", "4096", "--systems", "tbe", "embedding"]
TWO = ["--models", "fm", "deepfm", "--hidden", "256", "--systems", "table_wise", "row_wise", "server", "tbe"]
MARKS = (ONE, [*ONE, "--fill"], [*TWO, "--links", "loopback", "1gbit", "100mbit"])
"""What performance is promised for, at full size."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for preset in ("quick", "sweep", "marks"):
        words.add_argument(f"--{preset}", action="store_true")
    words.add_argument("--models", nargs="+", choices=MODELS, default=["deepfm"])
    words.add_argument(
        "--hidden", nargs="+", type=int, default=[256], help="width of the first layer; the next has half"
    )
    words.add_argument("--factors", nargs="+", type=int, default=[16])
    words.add_argument("--fields", nargs="+", type=int, default=[26])
    words.add_argument("--table-rows", nargs="+", type=int, default=[1_000_000], help="of each field")
    words.add_argument("--bag", nargs="+", type=int, default=[1], help="values per field and sample")
    words.add_argument("--zipf", nargs="+", type=float, default=[1.05])
    words.add_argument("--batch", nargs="+", type=int, default=[8192], help="samples of the global batch")
    words.add_argument("--workers", nargs="+", type=int, default=[2])
    words.add_argument("--links", nargs="+", choices=RATES, default=["loopback"])
    words.add_argument("--rule", nargs="+", choices=("rowwise_adagrad", "adagrad"), default=["rowwise_adagrad"])
    exchanges = ("auto", "sum", "gather", "rows")
    words.add_argument("--exchange", nargs="+", choices=exchanges, default=["auto"], help="DES's; auto: as it likes")
    words.add_argument("--fill", action="store_true", help="make all rows of DES live first, as other tables are")
    words.add_argument("--systems", nargs="+", choices=PEERS, default=PEERS)
    words.add_argument("--rounds", type=int, default=7)
    words.add_argument("--steps", type=int, default=10, help="steps of a block")
    words.add_argument("--out", type=Path, default=Path("runs/peers"), help="results.json and pictures go here")
    words.add_argument("--data", type=Path, help="keeps the data files for another time")
    return words


def cases(wanted: argparse.Namespace) -> Iterator[Case]:
    """Every combination of the options."""
    for model, hidden, factors, fields, rows, bag, zipf, batch, workers, link, rule, exchange in itertools.product(
        *(wanted.models, wanted.hidden, wanted.factors, wanted.fields, wanted.table_rows, wanted.bag),
        *(wanted.zipf, wanted.batch, wanted.workers, wanted.links, wanted.rule, wanted.exchange),
    ):
        yield Case(
            model=model,
            hidden=(hidden, max(hidden // 2, 1)),
            factors=factors,
            fields=fields,
            table_rows=rows,
            bag=bag,
            zipf=zipf,
            batch=batch,
            workers=workers,
            rule=rule,
            exchange=exchange,
            fill=wanted.fill,
            link=link,
        )


def runs(arguments: list[str]) -> list[argparse.Namespace]:
    """The command line, or the command lines that a preset stands for; what is said beside a preset wins."""
    wanted = parser().parse_args(arguments)
    lines = [QUICK] * wanted.quick + [[*BASE, *line] for line in SWEEP] * wanted.sweep + [*MARKS] * wanted.marks
    return [parser().parse_args([*line, *arguments]) for line in lines] or [wanted]


def systems(case: Case, wanted: list[str]) -> list[str]:
    """Of the systems asked for, those that are installed and make sense for so many workers."""
    there = importlib.util.find_spec("torchrec") is not None
    return [
        name
        for name in wanted
        if (there or not SYSTEMS[name].needs_peers) and (SYSTEMS[name].single or case.workers > 1)
    ]


def main() -> None:
    lines = runs(sys.argv[1:])
    out = lines[0].out
    out.mkdir(parents=True, exist_ok=True)
    results: list[Any] = []
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for wanted in lines:
            for case in cases(wanted):
                steps = wanted.steps if not 0 < RATES[case.link] <= 100 else min(wanted.steps, SLOW_STEPS)
                try:
                    result = compare(
                        case, systems(case, wanted.systems), wanted.data or Path(scratch), wanted.rounds, steps, _say
                    )
                except (LinkError, GroupError) as error:
                    failed |= isinstance(error, GroupError)
                    _say(f"left out: {case}\n{error}")
                    continue
                results.append(result)
                print(f"\n{title(result)}\n{table(result)}", flush=True)
                machine = {"cores": os.cpu_count(), "system": platform.platform(), "command": sys.argv[1:]}
                (out / "results.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    for peer in PEERS:
        for line in crossovers(results, peer):
            print(f"DES against {peer}, {line}")
    for path in draw(results, out):
        print(path)
    if failed or not results:
        sys.exit(1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
