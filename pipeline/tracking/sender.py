"""From journal to MLflow, so that sending again changes nothing.

A run bears its journal's key as a tag and is looked for before it is made; MLflow's stores keep one record of a
metric with the same name, step, time and value; parameters, tags, artifacts and the final status may be set again.
So an answer that got lost costs a repetition, never a double or a gap.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, TrefoilError, without_passwords
from pipeline.tracking import journal
from pipeline.tracking.journal import Entry, State
from pipeline.tracking.names import JOB_TAG, KEY_TAG, PARENT_TAG, quoted
from pipeline.tracking.store import URI_VARIABLE, connect, experiment_id, locked, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
METRICS_A_BATCH = 1000  # MLflow's own limit
PAIRS_A_BATCH = 100  # the same, of parameters or tags
_HOPELESS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}  # what MLflow answers to an entry that it will never take


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What `sync` did.

    Args:
        run_id: MLflow's id of the run.
        entries: journal entries sent by this call.
        rejected: entries among them that MLflow refused for good; they are in `rejected.jsonl`.
    """

    run_id: str
    entries: int
    rejected: int


def sync(spool: str | os.PathLike[str], *, uri: str | None = None) -> Sent:
    """Send what a run could not send while it lived. Does nothing where everything has arrived.

    Args:
        spool: the folder with `journal.jsonl`, or the run's folder that holds it as `tracking/`.
        uri: address of MLflow; by default `MLFLOW_TRACKING_URI`, else the address that the run used.

    Raises:
        DataError: there is no journal, or it is damaged.
        ConfigError: the run's address was not written down, because it held a password, and none is given.
        TrefoilError: MLflow cannot be reached or fails; the rest stays on disk.
    """
    folder = Path(spool)
    if not (folder / journal.JOURNAL).exists() and (folder / "tracking" / journal.JOURNAL).exists():
        folder = folder / "tracking"
    head, _ = next(journal.entries(folder))
    uri = uri or os.environ.get(URI_VARIABLE) or head["uri"]
    if uri is None:
        raise ConfigError(f"set {URI_VARIABLE}: the run's own address held a password and was not written down")
    try:
        return send(folder, lambda: connect(folder, uri=uri), relink=True)
    except TrefoilError:
        raise
    except Exception as cause:
        where = without_secrets(uri) or "the given address"
        raise TrefoilError(f"MLflow at {where} did not take all of {folder}: {cause}") from cause


def send(
    folder: Path,
    client_of: Callable[[], MlflowClient],
    *,
    on_progress: Callable[[], None] = lambda: None,
    relink: bool = False,
) -> Sent:
    """Send every entry that has not arrived. Whatever MLflow raises comes through; what had arrived is remembered.

    Args:
        folder: the journal's.
        client_of: makes a client, only if there is something to send.
        on_progress: called whenever something has arrived.
        relink: look once more for a parent that MLflow did not know, even if there is nothing to send.
    """
    with locked(folder / journal.LOCK):
        state = journal.read_state(folder)
        sent = rejected = 0
        client = None
        for batch, end in _batches(journal.entries(folder, state.offset)):
            if client is None:
                client = client_of()
                state = _open(client, folder, state)
            rejected += _deliver(client, folder, str(state.run_id), batch)
            sent += len(batch)
            state = replace(state, offset=end)
            journal.write_state(folder, state)
            for entry in batch:
                if "file" in entry:
                    shutil.rmtree((folder / entry["file"]).parent, ignore_errors=True)
            on_progress()
        if client is None and relink and not state.linked:
            _open(client_of(), folder, state)
        return Sent(run_id=state.run_id or "", entries=sent, rejected=rejected)


def _batches(waiting: Iterator[tuple[Entry, int]]) -> Iterator[tuple[list[Entry], int]]:
    """Neighbouring metric entries together, every other entry alone, each with the offset behind it."""
    batch: list[Entry] = []
    size = end = 0
    for entry, behind in waiting:
        alone = entry["kind"] != "metrics"
        if batch and (alone or size + len(entry["values"]) > METRICS_A_BATCH):
            yield batch, end
            batch, size = [], 0
        end = behind
        if alone:
            yield [entry], end
        else:
            batch.append(entry)
            size += len(entry["values"])
    if batch:
        yield batch, end


def _open(client: MlflowClient, folder: Path, state: State) -> State:
    """The state with the run made or found, and tied to its parent if that is known to MLflow by now."""
    if state.run_id is not None and state.linked:
        return state
    head, _ = next(journal.entries(folder))
    experiment = experiment_id(client, head["experiment"])
    run_id = state.run_id or _find(client, experiment, head["key"])
    if run_id is None:
        tags = {KEY_TAG: head["key"]} | ({"trefoil.parent": head["parent"]} if head["parent"] else {})
        run_id = client.create_run(experiment, start_time=head["ms"], tags=tags, run_name=head["name"]).info.run_id
    parent = _find_parent(client, experiment, head["parent"]) if head["parent"] else None
    if parent is not None:
        client.set_tag(run_id, PARENT_TAG, parent)
    state = replace(state, run_id=run_id, linked=parent is not None or not head["parent"])
    journal.write_state(folder, state)
    return state


def _find(client: MlflowClient, experiment: str, key: str, *, tag: str = KEY_TAG) -> str | None:
    """The id of the first run that bears a tag."""
    where, order = f"tags.`{tag}` = {quoted(key)}", ["attributes.start_time ASC"]
    found = client.search_runs([experiment], filter_string=where, max_results=1, order_by=order)
    return found[0].info.run_id if found else None


def _find_parent(client: MlflowClient, experiment: str, parent: str) -> str | None:
    """The parent's id, by the key of a run or the handle of a job."""
    return _find(client, experiment, parent, tag=JOB_TAG if "://" in parent else KEY_TAG)


def _deliver(client: MlflowClient, folder: Path, run_id: str, batch: list[Entry]) -> int:
    """Send a batch; parts that MLflow refuses for good are set aside one by one. Returns how many."""
    from mlflow.exceptions import MlflowException

    try:
        for entry in batch if len(batch) == 1 else [_merged(batch)]:
            _apply(client, folder, run_id, entry)
    except (MlflowException, FileNotFoundError) as cause:
        if isinstance(cause, MlflowException) and cause.error_code not in _HOPELESS:
            raise
        parts = [part for entry in batch for part in _parts(entry)]
        if len(parts) > 1:
            return sum(_deliver(client, folder, run_id, [part]) for part in parts)
        why = without_passwords(cause)
        log.warning("MLflow refuses an entry of %s: %s; it is kept in %s", folder, why, journal.REJECTED)
        journal.reject(folder, batch[0], why)
        return 1
    return 0


def _merged(batch: list[Entry]) -> Entry:
    """Metric entries as one, whose values carry their own step and time."""
    return {"kind": "merged", "metrics": [m for entry in batch for m in _metrics(entry)]}


def _metrics(entry: Entry) -> list[tuple[str, float, int, int]]:
    return [(name, value, entry["ms"], entry["step"]) for name, value in entry["values"].items()]


def _parts(entry: Entry) -> list[Entry]:
    """An entry of several values as entries of one each."""
    if entry["kind"] not in ("metrics", "params", "tags"):
        return [entry]
    return [entry | {"values": {name: value}} for name, value in entry["values"].items()]


def _apply(client: MlflowClient, folder: Path, run_id: str, entry: Entry) -> None:
    """Do in MLflow what one entry says."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    kind = entry["kind"]
    if kind in ("metrics", "merged"):
        metrics = [Metric(*m) for m in (entry["metrics"] if kind == "merged" else _metrics(entry))]
        for part in _chunks(metrics, METRICS_A_BATCH):
            client.log_batch(run_id, metrics=part)
    elif kind == "params":
        for part in _chunks([Param(*pair) for pair in entry["values"].items()], PAIRS_A_BATCH):
            client.log_batch(run_id, params=part)
    elif kind == "tags":
        for part in _chunks([RunTag(*pair) for pair in entry["values"].items()], PAIRS_A_BATCH):
            client.log_batch(run_id, tags=part)
    elif kind == "dataset":
        source = json.dumps({"uri": entry["source"]})
        found = Dataset(name=entry["name"], digest=entry["digest"], source_type="local", source=source)
        tag = InputTag("mlflow.data.context", entry["context"])
        client.log_inputs(run_id, datasets=[DatasetInput(dataset=found, tags=[tag])])
    elif kind == "artifact":
        path = folder / entry["file"]
        if path.is_dir():
            client.log_artifacts(run_id, str(path), entry["to"])
        else:
            if not path.exists():
                raise FileNotFoundError(f"the waiting artifact {path} is gone")
            client.log_artifact(run_id, str(path), entry["to"])
    elif kind == "resumed":
        client.update_run(run_id, status="RUNNING")
    elif kind == "finished":
        client.set_terminated(run_id, status=entry["status"], end_time=entry["ms"])


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
