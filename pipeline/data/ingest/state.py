"""What one ingest leaves for the next, so that day d+1 need not read days 1 to d again.

Everything known before T = (midnight after the last day) - label delay is condensed: rates of keys, newest
events of users, sessions, base rates. What happened since T may still have been unknown to a request of the
next day; those raw events are kept as they are and take part in the next ingest again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.data.ingest.assemble import iso_day
from pipeline.data.ingest.load import timezone
from pipeline.data.ingest.spec import IngestSpec
from pipeline.errors import ConfigError, DataError

FOLDER = "state"
_INFO = "state.json"


def lasting(spec: IngestSpec) -> dict[str, Any]:
    """The part of a spec that must be the same from one ingest to the next: all but files and days."""
    dump = spec.model_dump(mode="json", exclude={"parameters", "description"})
    for files in (dump["log"], *dump["tables"].values(), (dump["history"] or {}).get("earlier") or {}):
        files.pop("files", None)
    return {**dump, "days": {"timezone": spec.days.timezone}}


def end_of(spec: IngestSpec, day: int) -> int:
    """The midnight that ends a day (days since 1970), in milliseconds since 1970."""
    following = date(1970, 1, 1) + timedelta(days=day + 1)
    local = datetime(following.year, following.month, following.day, tzinfo=timezone(spec))
    return round(local.astimezone(UTC).timestamp() * 1000)


@dataclass(frozen=True)
class State:
    """A saved state.

    Args:
        folder: where it lies.
        last_day: the last day that was ingested, days since 1970.
    """

    folder: Path
    last_day: int

    @staticmethod
    def open(root: str | Path, spec: IngestSpec) -> State:
        """The state of a finished log.

        Raises:
            DataError: the log has none.
            ConfigError: it was made by another spec.
        """
        folder = Path(root) / FOLDER
        if not (folder / _INFO).is_file():
            raise DataError("the log has no saved state to go on from; ingest it with save_state", file=str(folder))
        info = json.loads((folder / _INFO).read_text())
        mine = json.loads(json.dumps(lasting(spec)))
        differ = [k for k in mine if mine[k] != info["spec"].get(k)]
        if differ:
            raise ConfigError(
                f"the spec differs from that of the earlier log in {', '.join(differ)}; only files and days may "
                "differ. Ingest all days again, or go on with the spec of the earlier log"
            )
        return State(folder, info["last_day"])

    def files(self, name: str) -> list[Path]:
        """Files of a part of the state, in order; none if there is no such part."""
        return sorted((self.folder / name).glob("*.parquet"))

    def read(self, name: str) -> pl.DataFrame | None:
        """A part of the state that is small enough for memory."""
        files = self.files(name)
        return pl.concat([pl.read_parquet(f) for f in files]) if files else None


def save_state(spec: IngestSpec, root: Path, parts: Iterable[Path], last_day: int) -> None:
    """Put together a state from the folders that the steps wrote (`PART/*.parquet` in each)."""
    folder = root / FOLDER
    if folder.exists():
        shutil.rmtree(folder)
    for part in parts:
        for file in sorted(part.glob("*/*.parquet")):
            target = folder / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    folder.mkdir(parents=True, exist_ok=True)
    info = {"spec": lasting(spec), "last_day": last_day, "last_day_iso": iso_day(last_day)}
    temporary = folder / (_INFO + ".tmp")
    temporary.write_text(json.dumps(info, indent=1))
    os.replace(temporary, folder / _INFO)
