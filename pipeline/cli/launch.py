"""Starting several ranks of a verb on this machine, and reading recipes from flags."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.recipes import SHIPPED, find
from pipeline.texts import parse_json
from pipeline.train.supervision import leave_with_parent

# Seconds that torchrun leaves its ranks between SIGTERM and SIGKILL, unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says other.
GRACE_S = 120


def recipe_of(argv: list[str]) -> tuple[str, Path, RunConfig]:
    """Recipe, folder of the log and whole configuration that the flags name: the defaults of all other flags.

    Raises:
        ConfigError: no recipe or data folder is named, or the recipe is unknown.
    """
    recipe, data = recipe_name(argv), _value(argv, "--data")
    if data is None and "--help" not in argv and "-h" not in argv:
        raise ConfigError("give --data DIR, a log made by `trefoil simulate` or `trefoil ingest`")
    return recipe or "demo", Path(data or "logs"), find(recipe or "demo")()


def recipe_name(argv: list[str]) -> str | None:
    """The recipe that the flags name; None where they ask for help instead.

    Raises:
        ConfigError: they name none.
    """
    recipe = _value(argv, "--recipe")
    if recipe is None and "--help" not in argv and "-h" not in argv:
        raise ConfigError(f"give --recipe NAME. Shipped: {', '.join(SHIPPED)}")
    return recipe


def launch(verb: str, argv: list[str], nproc: int, max_restarts: int, folder: Path) -> int:
    """Start `nproc` local ranks of a verb through torchrun; its status is ours.

    SIGTERM goes on to the ranks, which save and leave; then the status is 0, although torchrun calls it a failure.

    Args:
        verb: to run.
        argv: its flags.
        nproc: number of ranks.
        max_restarts: times that all ranks start again after one has failed.
        folder: of the run.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    launcher += [f"--max-restarts={max_restarts}", "-m", "pipeline.cli"]
    rest = _without(_without(argv, "--nproc"), "--max-restarts")
    if _value(argv, "--run-dir") is None:
        rest += ["--run-dir", str(folder)]
    # Ranks share the machine's cores: one thread each unless the user has said otherwise. torchrun's default is one
    # store for all attempts; ranks that start again then find the addresses of the attempt before, and hang.
    environment = {
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S),
        **os.environ,
    }
    told = False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        process.send_signal(signal.SIGTERM)

    # Were this process killed, torchrun and its ranks would go on, unseen, in the folder of the run.
    process = subprocess.Popen([sys.executable, *launcher, verb, *rest], env=environment, preexec_fn=leave_with_parent)
    before = signal.signal(signal.SIGTERM, leave)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0 if told and _state(folder) == "pre-empted" else status


def _state(folder: Path) -> str | None:
    path = folder / "status.json"
    try:
        return str(parse_json(path.read_bytes())["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a run that could not say how it ended did not end well


def _value(argv: list[str], flag: str) -> str | None:
    for i, text in enumerate(argv):
        if text == flag and i + 1 < len(argv):
            return argv[i + 1]
        if text.startswith(flag + "="):
            return text.removeprefix(flag + "=")
    return None


def _without(argv: list[str], flag: str) -> list[str]:
    """The arguments less a flag and its value: torchrun would take `--nproc` for an abbreviation of its own."""
    rest = [text for text in argv if not text.startswith(flag + "=")]
    if flag in rest:
        i = rest.index(flag)
        del rest[i : i + 2]
    return rest
