"""`ingest`: from a spec to a log, in steps that are each bounded in memory and done once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from pipeline.data.ingest.assemble import file_requests, merge
from pipeline.data.ingest.describe import causal_features, dataset_schema
from pipeline.data.ingest.load import load_spec
from pipeline.data.ingest.parallel import Processes
from pipeline.data.ingest.reading import identity_of
from pipeline.data.ingest.source import ROW, find_files, is_parquet, scan
from pipeline.data.ingest.spec import IngestSpec
from pipeline.data.ingest.stages import Inputs, Stages
from pipeline.data.ingest.state import State, save_state
from pipeline.data.ingest.work import Presence, at_work
from pipeline.data.logs import DESCRIPTION, Dataset
from pipeline.data.writer import LogWriter
from pipeline.errors import ConfigError, DataError

_SAMPLE_BYTES = 1 << 20
_FIXED_BYTES = 450 << 20  # interpreter, libraries, buffers of reading and writing, small side tables


def ingest(
    spec: str | Path | IngestSpec,
    out: str | Path,
    params: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
    *,
    count: Callable[[int, int], None] | None = None,
    previous: str | Path | None = None,
    keep_state: bool = False,
    memory_gb: float = 4.0,
    jobs: int = 1,
    workers: int = 1,
) -> Dataset:
    """Turn flat impression logs into a request-grouped log.

    A killed ingest goes on where it stopped when called again with the same arguments.

    Args:
        spec: path of a spec, name of a shipped one, or what `load_spec` made of one.
        out: folder of the log to be; must not hold one.
        params: values of the spec's parameters.
        progress: told what begins, in a few words.
        count: told how many steps are done, and of how many.
        previous: folder of a log made by the same spec with `keep_state`; only days after its last are
            ingested, and what they look back on comes from its state.
        keep_state: save what a later ingest needs to go on from this one, under `out/state`.
        memory_gb: about how much memory a process may use; decides into how many buckets the log is cut. The
            result does not depend on it.
        jobs: processes that handle buckets at the same time, each within `memory_gb`. The result does not
            depend on it. A script that gives more than 1 needs the usual `if __name__ == "__main__":`.
        workers: calls of this function with these same arguments, here or on other machines that see the same
            `out`, that share the work. Each takes what no other is at, one writes the log, all return it; what a
            worker was at when it died another does. One that comes when all is done returns the log too. The
            result does not depend on it.

    Raises:
        ConfigError: the spec, its parameters or an argument do not make sense, or are not those of `previous`.
        DataError: a file, column or row is not what the spec says, `out` already holds a log, or others are at work
            there on something else.
    """
    for name, value in (("jobs", jobs), ("workers", workers)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; give 1 or more")
    loaded = spec if isinstance(spec, IngestSpec) else load_spec(spec, params)
    out = Path(out)
    before = None if previous is None else State.open(previous, loaded)
    inputs = find_inputs(loaded)
    with Processes(jobs) as processes, at_work(out, shared=workers > 1) as presence:
        if (out / DESCRIPTION).exists():
            return _done_by_others(out, identity_of(loaded, inputs, before), shared=workers > 1)
        stages = Stages(
            loaded,
            inputs,
            out / ".work",
            buckets=max(bucket_count(loaded, inputs.logs, memory_gb), jobs * workers),
            previous=before,
            keep_state=keep_state,
            progress=progress or (lambda _: None),
            count=count,
            processes=processes,
            alone=presence.alone,
        )
        if workers > 1:
            presence.let_others_in()
            stages.work.check()
        return _run(loaded, out, stages, presence)


def _run(spec: IngestSpec, out: Path, stages: Stages, presence: Presence) -> Dataset:
    encoders = stages.encoders()
    schema = dataset_schema(spec, encoders.ids)  # refuses clashing names before the long work
    stages.prepare(encoders)
    stages.cross()
    stages.assemble(schema)
    with presence.last_part((out / DESCRIPTION).exists) as mine:
        if not mine:
            return Dataset.open(out)
        writer = LogWriter(out, schema)
        merge(spec, stages.request_folders(), writer, stages.progress, file_requests(schema))
        for name, how in spec.vocabularies.items():
            if how.method == "index":
                encoders.ids[name].write(out)
        if stages.keep_state:
            save_state(spec, out, stages.state_folders(encoders), stages.last_day)
        dataset = writer.close(stages.provenance(encoders))
        stages.written()
        presence.wait_until_alone()
        stages.work.remove()
        presence.remove_locks()
        return dataset


def _done_by_others(out: Path, identity: Mapping[str, Any], *, shared: bool) -> Dataset:
    """The log that the other workers have made.

    Raises:
        DataError: nobody shares this work, or the log is not of these arguments.
    """
    dataset = Dataset.open(out)
    made = dataset.description.provenance
    if not shared or {name: made.get(name) for name in identity} != json.loads(json.dumps(identity)):
        raise DataError("the folder already holds a log; choose another, or remove it first", file=str(out))
    return dataset


def find_inputs(spec: IngestSpec) -> Inputs:
    """Every file that the spec names.

    Raises:
        DataError: a path or glob names nothing.
    """
    earlier = spec.history.earlier if spec.history else None
    return Inputs(
        logs=find_files(spec.log, "log.files"),
        earlier=find_files(earlier, "history.earlier.files") if earlier else [],
        tables=[p for name, t in spec.tables.items() for p in find_files(t, f"tables.{name}.files")],
    )


def bucket_count(spec: IngestSpec, logs: list[Path], memory_gb: float) -> int:
    """Into how many buckets to cut a log so that one fits the memory.

    Raises:
        ConfigError: less memory than the program itself takes.
    """
    budget = memory_gb * 2**30 - _FIXED_BYTES
    if budget <= 0:
        raise ConfigError(f"memory_gb is {memory_gb:g}; give more than {_FIXED_BYTES / 2**30:.2g}")
    rows = sum(_guess_rows(spec, path) for path in logs)
    columns = 20 + len(spec.features) + len(causal_features(spec)) + 4 * len(spec.tasks)
    bytes_per_row = 8 * columns * 4  # a few copies live at the same time
    return max(1, math.ceil(rows * bytes_per_row / budget))


def _guess_rows(spec: IngestSpec, path: Path) -> float:
    """About how many impressions a file holds: exact for Parquet, by the length of the first lines for CSV."""
    if is_parquet(spec.log, path):
        rows = float(pq.read_metadata(path).num_rows)
    else:
        with path.open("rb") as file:
            start = file.read(_SAMPLE_BYTES)
        rows = path.stat().st_size / max(len(start), 1) * (start.count(b"\n") + 1)
    if spec.log.explode is None:
        return rows
    head = scan(spec.log, path).head(10_000).select(pl.len(), pl.col(ROW).max().alias("lines")).collect()
    return rows * head["len"][0] / max(head["lines"][0] or 0, 1)
