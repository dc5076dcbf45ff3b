"""What the documents say exists: files, config keys, commands."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

from pipelines import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = "benchmarks|components|configs|des_core|docs|k8s|pipelines|tests"
ELSEWHERE = ("# needs a cluster", "# needs a GPU", "# needs Docker")
"""Marks of commands that no test here can run."""

SHELL = ("cd", "export", "git")
"""Programs that are not ours."""

RUN_BY: dict[str, str] = {"kubectl": "tests/k8s"}
"""Program: the tests that run it as the documents show it."""


def commands(page: Path) -> list[str]:
    """Command lines of a page's ``sh`` blocks, continued lines joined, marked ones left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#") and not line.endswith(ELSEWHERE)]


COMMANDS = [(page.name, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_whole(page: Path) -> None:
    """Every block of table lines begins with its head and has as many cells in each row."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, rule, *rows = block.splitlines() if block.count("\n") > 1 else [block, ""]
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, *rows)]
        assert re.fullmatch(r"\|(?: ?:?-+:? ?\|)+", rule), f"{page.name}: no head above: {head[:80]}"
        assert len(set(cells)) == 1, f"{page.name}: rows of other lengths under: {head[:80]}"


def test_no_entry_of_the_changelog_is_said_twice() -> None:
    entries = re.findall(r"^- .*(?:\n  .*)*", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert len(entries) == len(set(entries))


def test_the_config_page_is_current() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "config.py"))["page"]()
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == written, "docs/config.md is old; run make docs"


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda part: part)
def test_commands_are_known(page: str, line: str) -> None:
    """A make target exists; a ``des`` command takes these options; another program is run by a test of its own."""
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
    program = Path(words[0]).name
    if program == "python":
        tests = (ROOT / "tests").glob("test_*.py")
        assert any(f'"{Path(words[1]).name}"' in test.read_text(encoding="utf-8") for test in tests)
    elif program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert all(
            re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M) for target in targets
        )
    elif program == "des":
        command, rest = typer.main.get_command(cli.app), words[1:]
        while hasattr(command, "commands"):
            name, *rest = rest
            command = command.commands[name]
        with command.make_context(name, rest):
            configs = [word for word in words if word.startswith("configs/")]
            assert all((ROOT / config).is_file() for config in configs)
    elif program not in SHELL:
        tests = list((ROOT / RUN_BY[program]).rglob("test_*.py"))
        assert any(f'"{program}"' in test.read_text(encoding="utf-8") for test in tests), f"{page}: nothing runs {line}"
