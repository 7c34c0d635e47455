"""What a person sees of long work, and what a file, a pipe and a machine get instead."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.cli import VERBS, main
from pipeline.cli.rollout import VERBS as ROLLOUT_VERBS
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.progress import Bar

ROOT = Path(__file__).parents[2]
COMMANDS = [(v,) for v in VERBS if v != "rollout"] + [("rollout", v) for v in ROLLOUT_VERBS]
ESCAPE = "\x1b"
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m|\x1b\[[0-9;]*9[0-9][0-9;]*m")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log") / "data"
    simulate(root, SimulationConfig.tiny())
    return root


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The bar's own clock, which a test moves on."""
    now = [0.0]
    monkeypatch.setattr("pipeline.progress.time.monotonic", lambda: now[0])
    return now  # type: ignore[return-value]


def terminal(**more: object) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=110, _environ={"TERM": "xterm"}, **more)  # type: ignore[arg-type]


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_bar_tells_what_how_much_how_fast_and_how_long(clock: list[float]) -> None:
    console = terminal(get_time=lambda: clock[0])
    with Bar(console, "steps") as bar:
        for done in range(21):
            bar(done, 100, "epoch 1 of 2")
            clock[0] += 0.5
        shown = written(console).rpartition("epoch 1 of 2")[2]
        assert "20/100 steps" in shown
        assert "2.0/s" in shown
        assert "0:00:40" in shown  # 80 steps at 2 a second
    # The line is cleared and the cursor is back.
    assert written(console).rstrip("\r").endswith(("\x1b[2K", "\x1b[?25h"))
    assert "\x1b[?25h" in written(console)


def test_a_bar_draws_seldom_and_is_gone_when_all_is_done(clock: list[float]) -> None:
    console = terminal()
    with Bar(console, "steps") as bar:
        for done in range(1000):
            clock[0] += 0.001
            bar(done, 1000, "scoring")
        # The first at once, then every quarter of a second; what drawing itself repeats does not count.
        assert len(set(re.findall(r"(\d+)/1,000 steps", written(console)))) == 4
        bar(1000, 1000, "scoring")
        assert written(console).count("\x1b[?25h") == 1
        console.print("a line of its own")
        assert written(console).endswith("a line of its own\n")


def test_an_error_leaves_the_terminal_as_it_was() -> None:
    console = terminal()

    def fails() -> None:
        with Bar(console, "steps") as bar:
            bar(1, 10, "x")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fails()
    assert written(console).count("\x1b[?25l") == written(console).count("\x1b[?25h") == 1


def test_nothing_is_drawn_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Console(file=io.StringIO())
    quiet = terminal(quiet=True)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    for console in (file, quiet, dumb):
        with Bar(console, "steps") as bar:
            bar(1, 10, "x")
        assert written(console) == ""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_verb_can_be_quiet_and_speak_to_machines(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    shown = capsys.readouterr().out
    assert "--quiet" in shown
    assert "--json" in shown
    assert f"trefoil {' '.join(command)}" in shown.partition("Example:")[2]
    assert ESCAPE not in shown


SHORT = {
    "simulate": ["--out", "OUT", "--requests", "60", "--users", "20", "--items", "20", "--days", "3"],
    "inspect": ["LOG"],
    "recipes": [],
    "doctor": [],
    "completion": ["bash"],
}


@pytest.mark.parametrize("verb", SHORT)
def test_words_for_people_json_for_machines_and_silence(
    verb: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for i, flags in enumerate(([], ["--json"], ["--json", "--quiet"], ["--quiet"])):
        argv = [{"LOG": str(log), "OUT": str(tmp_path / str(i))}.get(a, a) for a in SHORT[verb]]
        assert main([verb, *argv, *flags]) == 0
        said.append(capsys.readouterr())
    words, machine, only, silence = said
    assert words.out
    assert ESCAPE not in words.out + machine.err
    assert json.loads(machine.out).keys() == json.loads(only.out).keys()
    assert (only.err, silence.out, silence.err) == ("", "", "")


def in_a_terminal(argv: list[str], folder: Path, **environment: str) -> str:
    """What a command writes to a terminal of 100 columns."""
    leader, follower = pty.openpty()
    settings = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")}
    settings |= {"TERM": "xterm-256color", "COLUMNS": "100", "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *argv], stdout=follower, stderr=follower, env=settings, cwd=folder
    )
    os.close(follower)
    text = b""
    try:
        while part := os.read(leader, 65536):
            text += part
    except OSError:
        pass  # Linux says so when the other end is closed
    os.close(leader)
    assert process.wait() == 0, text.decode()
    return text.decode()


def test_a_terminal_gets_a_bar_without_colours_where_nobody_wants_them(tmp_path: Path) -> None:
    flags = ["--requests", "1200", "--users", "60", "--items", "60", "--days", "6"]
    shown = in_a_terminal(["simulate", "--out", "a", *flags], tmp_path)
    assert "simulating" in shown
    assert re.search(r"[\d,]+/1,200 requests", shown)
    assert COLOUR.search(shown)
    plain = in_a_terminal(["simulate", "--out", "b", *flags], tmp_path, NO_COLOR="1")
    assert "simulating" in plain
    assert COLOUR.search(plain) is None
    # A job whose scheduler writes a terminal's output to a file.
    filed = in_a_terminal(["simulate", "--out", "c", *flags], tmp_path, TTY_COMPATIBLE="0")
    assert filed.replace("\r", "").startswith("wrote c: 1,200 requests")
    assert ESCAPE not in filed


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        ("ENOSPC", "make room, and give the same command again"),
        ("EROFS", "give a folder on a disk that can be written"),
    ],
)
def test_an_error_of_the_system_says_what_to_do(
    number: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    def fails(*_: object) -> None:
        value = getattr(errno, number)
        raise OSError(value, os.strerror(value), "/here")

    monkeypatch.setattr("pipeline.cli.recipes.main", fails)
    assert main(["recipes"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"trefoil recipes: {os.strerror(getattr(errno, number))} (/here); {hint}")
