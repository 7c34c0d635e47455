"""Ranks that fail start again as often as asked, and meet each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchx_specs.train import train

RANK = """
import os, pathlib, sys
import torch.distributed as dist
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
dist.init_process_group("gloo")
pathlib.Path(sys.argv[1], f"{attempt}-{dist.get_rank()}").touch()
dist.barrier()
if attempt < 2 and dist.get_rank() == 0:
    sys.exit(3)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_restarts_are_three_attempts_of_both_ranks(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "seen").mkdir()
    role = train(recipe="demo", data="logs", nproc=2, max_restarts=2, python=sys.executable).roles[0]
    # The scheduler's part: macros filled in, two dollars made one.
    line = role.args[1].replace("${app_id}", "restarts").replace("$$", "$")
    launcher, _, _ = line.partition(" -m pipeline.cli ")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_")}
    done = subprocess.run(
        ["bash", "-c", f"{launcher} {tmp_path / 'rank.py'} {tmp_path / 'seen'}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "seen").iterdir()) == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
