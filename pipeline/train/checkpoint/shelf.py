"""A run's folder of checkpoints: which there are, which are kept, which can be trusted."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import CheckpointConfig
from pipeline.errors import CheckpointError
from pipeline.train.checkpoint.files import verify
from pipeline.train.checkpoint.state import read_metrics, read_state
from pipeline.train.sharding import Ranks

_NAME = re.compile(r"epoch-(\d+)-step-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, from the one that has trained longest to the one that has trained least."""
    found = [
        (int(m[1]), int(m[2]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (m := _NAME.fullmatch(path.name))
    ]
    return [path for _, _, path in sorted(found, reverse=True)]


def newest(folder: Path) -> Path | None:
    """The checkpoint in a run's folder that has trained longest, or None."""
    return next(iter(checkpoints(folder)), None)


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """A run's checkpoints, of which only some are kept.

    Args:
        folder: RUN/checkpoints.
        config: how many to keep.
    """

    folder: Path
    config: CheckpointConfig

    def kept(self) -> tuple[list[Path], list[Path]]:
        """The newest and the best, as the configuration wants them; the newest is always among the first."""
        found = checkpoints(self.folder)
        latest = found[: self.config.keep_newest]
        metric = self.config.best_metric
        if metric is None:
            return latest, []
        known = [(read_metrics(path).get(metric), path) for path in found]
        scored = [(value, path) for value, path in known if value is not None]
        # Among equals the newer one, which comes first in `found`: sorting is stable.
        scored.sort(key=lambda pair: pair[0] if self.config.best_is == "lowest" else -pair[0])
        return latest, [path for _, path in scored[: self.config.keep_best]]

    def prune(self) -> list[Path]:
        """Remove checkpoints that are neither among the newest nor the best; returns them."""
        latest, best = self.kept()
        gone = [path for path in checkpoints(self.folder) if path not in latest and path not in best]
        for path in gone:
            # Renamed first: a folder half removed must not look like a checkpoint.
            doomed = path.with_name(f".{path.name}.removing")
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(path, doomed)
            shutil.rmtree(doomed)
        return gone

    def newest_good(self, ranks: Ranks) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files are what was written; every rank calls this, and they share the reading.

        Damaged ones are set aside under another name. Returns the path and what was wrong with newer ones.

        Raises:
            CheckpointError: there are checkpoints, and none is good.
        """
        problems: list[str] = []
        for path in checkpoints(self.folder):
            problem = ""
            try:
                read_state(path)
                verify(path, part=ranks.rank, parts=ranks.world_size)
            except (CheckpointError, OSError) as error:
                problem = str(error)
            found = [p for p in ranks.gather(problem) if p]
            if not found:
                return path, problems
            problems.append(found[0])
            if ranks.is_first:
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
            ranks.barrier()
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be gone on with; each is kept as NAME.damaged. "
                "Give another --run-dir to start anew:\n  - " + "\n  - ".join(problems)
            )
        return None, []
