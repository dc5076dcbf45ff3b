"""The role of workers that score a day's new rows with the champion, before anything is trained on them.

score-asked.json names the champion; what was found, over all rows and day by day, is score-found.json.
"""

from __future__ import annotations

import numpy as np

from des_core.contracts import LABEL, Dataset
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.judging import homes, opponents
from des_core.engine.judging.measure import NAMES, Judge, Rows
from des_core.engine.judging.swap import total
from des_core.engine.process import main
from des_core.run import Run
from des_core.verdict import Asked, FoundNew


def score(run: Run, peers: Collectives, resume: bool) -> None:
    """Score the rows of train and test, which the champion was not trained on."""
    reference = run.reference("score-asked.json")
    asked = Asked.load(reference)
    try:
        found = _found(run, peers, asked, reference.sha256)
    except opponents.CannotScore as error:
        found = FoundNew(asked=reference.sha256, reason=str(error))
    if peers.rank == 0:
        found.write(run.path("score-found.json"))


def _found(run: Run, peers: Collectives, asked: Asked, sha256: str) -> FoundNew:
    (opponent,) = asked.opponents.values()
    known = Dataset.load(run.dataset)
    labels, scores, days, start = [], [], [], 0
    positions = []
    splits = ("train", "test")
    for split, (theirs, here) in zip(splits, opponents.scores(run, peers, opponent, splits), strict=True):
        labels.append(homes.column(peers, run.dataset, split, LABEL).astype(np.float32)[here])
        scores.append(theirs[here])
        days.append(opponents.days_of(run, peers, split)[here])
        positions.append(start + homes.places(known.rows(split), peers)[here])
        start += known.rows(split)
    rows = Rows(np.concatenate(labels), np.concatenate(positions))
    scored, day = np.concatenate(scores), np.concatenate(days)
    judge = Judge(peers, known.task)
    samples, broken = total(peers, [len(scored), int((~np.isfinite(scored)).sum())]).tolist()
    if broken:
        raise opponents.CannotScore(f"{broken:,} of its scores are not finite")
    by_day = {}
    for number, name in enumerate(sorted(known.parts)):
        mine = np.flatnonzero(day == number)
        many = int(total(peers, [len(mine)])[0])
        if many:
            by_day[name] = {"samples": float(many)} | _metrics(judge, rows.where(mine), scored[mine])
    metrics = _metrics(judge, rows, scored) if samples else {}
    return FoundNew(asked=sha256, samples=samples, metrics=metrics, days=by_day)


def _metrics(judge: Judge, rows: Rows, scores: homes.Array) -> dict[str, float]:
    found = judge.metrics(rows, judge.model(rows, scores))
    return {name: float(found[name]) for name in NAMES if found[name] is not None}


if __name__ == "__main__":
    main(score)
