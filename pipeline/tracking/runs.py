"""Runs read back from MLflow: found by their tags, newest first."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import DataError
from pipeline.tracking.names import quoted
from pipeline.tracking.store import connect, is_embedded, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_PAGE = 500


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """A run as MLflow holds it.

    Args:
        run_id: MLflow's id.
        name: shown in MLflow.
        started_ms: milliseconds since 1970.
        tags: MLflow's own (`mlflow.*`) left out.
        metrics: last value by name.
    """

    run_id: str
    name: str
    started_ms: int
    tags: Mapping[str, str]
    metrics: Mapping[str, float]

    @property
    def folder(self) -> Path:
        """The run's own folder, with its checkpoints and predictions.

        Raises:
            DataError: the run says none, or it is not on this machine.
        """
        place = self.tags.get("run_dir")
        if place is None:
            raise DataError(f"run {self.name} does not say where its files lie; train it again with this version")
        if not Path(place).is_dir():
            raise DataError(f"the files of run {self.name} are gone or on another machine", file=place)
        return Path(place)


def find_runs(root: str | os.PathLike[str], tags: Mapping[str, str]) -> list[FoundRun]:
    """Finished runs that bear all the given tags, newest first; of all experiments.

    Args:
        root: folder of the embedded store, where `MLFLOW_TRACKING_URI` names no server.
        tags: such as recipe, seed, dataset, surface, wave, sweep, kind.

    Raises:
        DataError: there is no store.
    """
    client = existing(root)
    wanted = [f"tags.`{name}` = {quoted(value)}" for name, value in tags.items()]
    where = " and ".join(["attributes.status = 'FINISHED'", *wanted])
    return [
        FoundRun(
            run_id=run.info.run_id,
            name=run.info.run_name or "",
            started_ms=run.info.start_time,
            tags={k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.")},
            metrics=dict(run.data.metrics),
        )
        for run in search(client, where)
    ]


def newest_by_seed(runs: list[FoundRun]) -> dict[int, FoundRun]:
    """The newest run of each seed, by seed.

    Args:
        runs: newest first.
    """
    found: dict[int, FoundRun] = {}
    for run in runs:
        if "seed" in run.tags:
            found.setdefault(int(run.tags["seed"]), run)
    return dict(sorted(found.items()))


def metric_history(root: str | os.PathLike[str], run: FoundRun, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, in order of step; empty if the run has none of that name."""
    points = sorted(existing(root).get_metric_history(run.run_id, metric), key=lambda m: (m.step, m.timestamp))
    return [m.step for m in points], [m.value for m in points]


def read_artifact(root: str | os.PathLike[str], run: FoundRun, name: str) -> str:
    """The text of a run's artifact file.

    Raises:
        DataError: the run has none of that name.
    """
    from mlflow.exceptions import MlflowException

    client = existing(root)
    try:
        path = client.download_artifacts(run.run_id, name)
    except (MlflowException, OSError) as error:
        kept = ", ".join(a.path for a in client.list_artifacts(run.run_id)) or "none"
        raise DataError(f"run {run.name} has no artifact {name!r}; it has {kept}") from error
    return Path(path).read_text(encoding="utf-8")


def existing(root: str | os.PathLike[str], *, uri: str | None = None) -> MlflowClient:
    """A client of a store that is there: reading must not make an empty one where a path is mistaken.

    Args:
        root: folder of the embedded store.
        uri: address of the store; `tracking_uri(root)` by default.

    Raises:
        DataError: there is no store.
    """
    uri = uri or tracking_uri(root)
    if is_embedded(uri) and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise DataError(
            "there is no MLflow store; set TREFOIL_HOME to the folder of your runs, or train one first",
            file=uri.removeprefix("sqlite:///"),
        )
    return connect(root, uri=uri)


def search(client: MlflowClient, where: str) -> Iterator[Run]:
    """Runs of all experiments, newest first, that fit a filter in MLflow's own words."""
    experiments, token = [], None
    while True:
        page = client.search_experiments(max_results=_PAGE, page_token=token)
        experiments += [e.experiment_id for e in page]
        token = page.token
        if not token:
            break
    while True:
        found = client.search_runs(
            experiments, where, max_results=_PAGE, order_by=["attributes.start_time DESC"], page_token=token
        )
        yield from found
        token = found.token
        if not token:
            return
