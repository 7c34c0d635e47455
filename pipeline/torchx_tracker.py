"""Our runs in MLflow as TorchX's tracker: `torchx tracker list`, and what a job's own code tells `torchx.tracker`.

TorchX names a job by its handle, such as slurm://torchx/7, and gives it to the job. Every run that begins in a job
bears the handle as a tag (`pipeline.tracking.Tracker`), so this keeps nothing of its own: it reads MLflow by that tag,
and writes to the run that lives in the process, or to one that it makes. TorchX had a tracker for MLflow in its release
0.7 and has none now; that one began a second run for the job and knew nothing of a server that is down.

Registered as the entry point `trefoil` of `torchx.tracker`; `.torchxconfig` names it.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torchx.tracker.api import Lineage, TrackerArtifact, TrackerBase, TrackerSource

from pipeline.config import default_home
from pipeline.errors import DataError
from pipeline.tracking import Tracker
from pipeline.tracking.names import (
    JOB_PARENT_TAG,
    JOB_PARENT_VARIABLE,
    JOB_TAG,
    JOB_VARIABLE,
    PARENT_TAG,
    flatten,
    quoted,
)
from pipeline.tracking.runs import existing, search
from pipeline.tracking.store import URI_VARIABLE

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "torchx"
# Tags of what a job's own code tells: JSON, and of a hash where the name may be one that MLflow does not take.
ARTIFACT_TAG, SOURCE_TAG = "torchx.artifact.", "torchx.source."
CHECKPOINT_TAG = "checkpoint"
# The kind of a run that holds nothing but what a job's own code told.
KIND_TAG, KIND = "kind", "torchx"


def tracker(config: str | None) -> JobTracker:
    """TorchX's factory.

    Args:
        config: address of MLflow from `[tracker:trefoil]`, where `MLFLOW_TRACKING_URI` names none.
    """
    return JobTracker(config)


class JobTracker(TrackerBase):
    """TorchX's jobs as MLflow holds them.

    Reading takes the runs of a job together: the first that began is the job's own; those that it made (trials,
    exports, waves) are named in its metadata. Writing goes through a journal and so waits for no server.

    Args:
        uri: address of MLflow; by default that of `pipeline.tracking.tracking_uri`.
    """

    def __init__(self, uri: str | None = None) -> None:
        self._uri = os.environ.get(URI_VARIABLE) or uri
        self._made: dict[str, Tracker] = {}

    def __repr__(self) -> str:
        return "JobTracker of Trefoil's runs in MLflow"

    def run_ids(self, **kwargs: str) -> Iterable[str]:
        """Handles of jobs, newest first.

        Args:
            kwargs: `parent_run_id`, to take only those that have it among their sources.
        """
        parent = kwargs.get("parent_run_id")
        runs = search(self._client(), f"tags.`{JOB_TAG}` LIKE '%'")
        found = [r for r in runs if parent is None or parent in {s.source_run_id for s in _sources(r)}]
        return list(dict.fromkeys(run.data.tags[JOB_TAG] for run in found))

    def metadata(self, run_id: str) -> Mapping[str, object]:
        """What MLflow knows of a job: ids and status, tags, parameters, last metrics, and the runs that it made.

        Raises:
            DataError: no run bears the handle.
        """
        first, *others = self._runs(run_id)
        info = first.info
        known: dict[str, object] = {
            "mlflow_run_id": info.run_id,
            "mlflow_experiment_id": info.experiment_id,
            "name": info.run_name,
            "status": info.status,
        }
        if PARENT_TAG in first.data.tags:
            known["mlflow_parent_run_id"] = first.data.tags[PARENT_TAG]
        for run in (first, *others):
            if run is first or run.data.tags.get(KIND_TAG) == KIND:
                known |= {n: v for n, v in run.data.tags.items() if _is_plain(n)}
                known |= {**run.data.params, **run.data.metrics}
            else:
                known[f"run {run.info.run_name}"] = run.info.run_id
        return known

    def artifacts(self, run_id: str) -> Mapping[str, TrackerArtifact]:
        """By name: files and folders among a job's artifacts in MLflow, its last checkpoint, registered versions of its
        models, and what its own code told of. Names of other runs than the job's own begin with the run's.

        Raises:
            DataError: no run bears the handle.
        """
        client = self._client()
        found: dict[str, TrackerArtifact] = {}
        for i, run in enumerate(self._runs(run_id)):
            before = f"{run.info.run_name}/" if i and run.data.tags.get(KIND_TAG) != KIND else ""
            for file in client.list_artifacts(run.info.run_id):
                size = None if file.is_dir else {"bytes": file.file_size}
                found[before + file.path] = TrackerArtifact(
                    before + file.path, f"{run.info.artifact_uri}/{file.path}", size
                )
            # An export's tag is the name of the checkpoint that it read, not a place.
            if not before and CHECKPOINT_TAG in run.data.tags:
                found[CHECKPOINT_TAG] = TrackerArtifact(CHECKPOINT_TAG, run.data.tags[CHECKPOINT_TAG], None)
            for version in client.search_model_versions(f"run_id = '{run.info.run_id}'"):
                place = f"models:/{version.name}/{version.version}"
                found[place] = TrackerArtifact(place, place, {"run": run.info.run_name})
            for tag, value in run.data.tags.items():
                if tag.startswith(ARTIFACT_TAG):
                    told = TrackerArtifact(**json.loads(value))
                    found[told.name] = told
        return found

    def sources(self, run_id: str, artifact_name: str | None = None) -> Iterable[TrackerSource]:
        """What a job comes from: the parent that the launcher named, and what its own code told of.

        Args:
            run_id: handle of the job.
            artifact_name: only sources of that name.

        Raises:
            DataError: no run bears the handle.
        """
        found = {(s.source_run_id, s.artifact_name): s for run in self._runs(run_id) for s in _sources(run)}
        return [s for s in found.values() if artifact_name is None or s.artifact_name == artifact_name]

    def lineage(self, run_id: str) -> Lineage:
        """TorchX has not defined what it is.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "TorchX defines no lineage yet; `sources`, and `run_ids` of a parent, tell what it will"
        )

    def add_metadata(self, run_id: str, **kwargs: object) -> None:
        """Keep values as parameters of a job's run, nested ones by dotted name; a parameter keeps its first value."""
        self._record(run_id).log_params(flatten(kwargs))

    def add_artifact(self, run_id: str, name: str, path: str, metadata: Mapping[str, object] | None = None) -> None:
        """Keep the place of something that a job made; its content stays where it is."""
        told = {"name": name, "path": path, "metadata": None if metadata is None else dict(metadata)}
        self._record(run_id).set_tags({ARTIFACT_TAG + _short(name): json.dumps(told)})

    def add_source(self, run_id: str, source_id: str, artifact_name: str | None = None) -> None:
        """Keep what a job comes from: another job's handle, or whatever else has an id."""
        if artifact_name is None and source_id == os.environ.get(JOB_PARENT_VARIABLE):
            return  # TorchX tells it of every job that has a parent, and every run of the job bears it
        told = {"source_run_id": source_id, "artifact_name": artifact_name}
        self._record(run_id).set_tags({SOURCE_TAG + _short(f"{source_id} {artifact_name}"): json.dumps(told)})

    def close(self) -> None:
        """Finish the runs that were made for what jobs told; done at the end of the process too."""
        atexit.unregister(self.close)
        while self._made:
            self._made.popitem()[1].finish()

    def _client(self) -> MlflowClient:
        return existing(default_home(), uri=self._uri)

    def _runs(self, handle: str) -> list[Run]:
        """The runs of a job, the first that began first, those that hold only what its own code told last."""
        runs = list(search(self._client(), f"tags.`{JOB_TAG}` = {quoted(handle)}"))
        if not runs:
            raise DataError(
                f"no run in MLflow is of the job {handle}; `torchx tracker list jobs` names those there are"
            )
        return sorted(runs, key=lambda run: (run.data.tags.get(KIND_TAG) == KIND, run.info.start_time))

    def _record(self, handle: str) -> Tracker:
        """The run that lives in this process, if it is of the job; else one that is made for what is told."""
        live = Tracker.live()
        if live is not None and os.environ.get(JOB_VARIABLE) == handle:
            return live
        if handle not in self._made:
            name = re.sub(r"\W+", "-", handle).strip("-")
            self._made[handle] = Tracker.start(
                name,
                run_dir=default_home() / "torchx" / f"{name}-{uuid.uuid4().hex[:8]}",
                root=default_home(),
                experiment=EXPERIMENT,
                tags={KIND_TAG: KIND, JOB_TAG: handle},
            )
            if len(self._made) == 1:
                atexit.register(self.close)
        return self._made[handle]


def _sources(run: Run) -> list[TrackerSource]:
    tags = run.data.tags
    named = [TrackerSource(tags[JOB_PARENT_TAG], None)] if JOB_PARENT_TAG in tags else []
    return named + [TrackerSource(**json.loads(v)) for tag, v in sorted(tags.items()) if tag.startswith(SOURCE_TAG)]


def _is_plain(tag: str) -> bool:
    return not tag.startswith(("mlflow.", "trefoil.", ARTIFACT_TAG, SOURCE_TAG))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
