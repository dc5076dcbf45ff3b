"""Progress: every event as a line without a terminal, a bar with one, and no flood."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from components.launch.progress import Progress

ROOT = Path(__file__).parent.parent.parent
STEP = {"event": "step", "step": "3", "of": "10", "epoch": "1", "loss": "0.5", "samples_per_s": "12300", "eta_s": "75"}


def test_without_a_terminal_events_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.show(STEP)
        progress.show({"event": "valid", "epoch": "1", "auc": "0.75"})
    assert capsys.readouterr().err.splitlines() == [
        "event=step step=3 of=10 epoch=1 loss=0.5 samples_per_s=12300 eta_s=75",
        "event=valid epoch=1 auc=0.75",
    ]


def test_fleeting_events_are_thinned_but_the_last_one_and_all_others_stay(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(every_s=60) as progress:
        for step in range(1, 11):
            progress.show({**STEP, "step": str(step)})
        progress.show({"event": "valid", "epoch": "1", "auc": "0.75"})
        progress.show({"event": "checkpoint", "step": "10"})
    words = [line.split()[:2] for line in capsys.readouterr().err.splitlines()]
    assert words == [
        ["event=step", "step=1"],
        ["event=step", "step=10"],
        ["event=valid", "epoch=1"],
        ["event=checkpoint", "step=10"],
    ]


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end() -> None:
    script = (
        "import time\n"
        "from components.launch.progress import Progress\n"
        f"step = {STEP!r}\n"
        "with Progress() as progress:\n"
        "    progress.show({'event': 'valid', 'auc': '0.7512'})\n"
        "    progress.show(step)\n"
        "    time.sleep(0.3)\n"
        "    progress.show({'event': 'evaluate', 'split': 'test', 'done': '5', 'of': '9'})\n"
        "print('after')\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "140", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], stderr=theirs, stdout=subprocess.PIPE, env=environment, check=True, cwd=ROOT
    )
    os.close(theirs)
    drawn = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        drawn += piece
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.decode())
    for word in ("3/10", "loss 0.5000", "valid AUC 0.7512", "12,300 samples/s", "1:15 left", "5/9", "test"):
        assert word in text
    assert done.stdout == b"after\n"
