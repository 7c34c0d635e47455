"""Where MLflow keeps its records: a server named by `MLFLOW_TRACKING_URI` or by TorchX, or an embedded sqlite store.

The embedded store is `ROOT/mlflow.db` with artifacts under `ROOT/mlartifacts`. MLflow is imported inside
functions: it costs over a second.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI_VARIABLE = "MLFLOW_TRACKING_URI"
# The same from `[tracker:trefoil] config` of .torchxconfig, which TorchX hands to its jobs.
TORCHX_URI_VARIABLE = "TORCHX_TRACKER_TREFOIL_CONFIG"
# Without it MLflow's pages take an experiment for one of language models, and hide charts and comparison.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # Standard output belongs to the command, which may print JSON there.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # At the defaults a silent server holds a caller for minutes. Retries are left to the tracker, which looks
    # first whether the lost answer was to a request that had worked.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def prepare_environment() -> None:
    """Telemetry off, time-outs short; a variable that the user has set stays as it is."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def tracking_uri(root: str | os.PathLike[str]) -> str:
    """The address of the store: `MLFLOW_TRACKING_URI` where set, else that of TorchX's tracker, else the sqlite file
    under `root`."""
    given = os.environ.get(URI_VARIABLE) or os.environ.get(TORCHX_URI_VARIABLE)
    return given or f"sqlite:///{Path(root).absolute() / 'mlflow.db'}"


def without_secrets(uri: str) -> str | None:
    """The address if it may be written to disk; None if it carries a user or a password."""
    return None if "@" in urlsplit(uri).netloc else uri


def is_embedded(uri: str) -> bool:
    """Whether the address is a local sqlite file."""
    return uri.startswith("sqlite:///")


def connect(root: str | os.PathLike[str], *, uri: str | None = None) -> MlflowClient:
    """A client of the store for runs and registry alike; makes the embedded store if it is not there yet.

    Args:
        root: folder of the embedded store.
        uri: address of the store; `tracking_uri(root)` by default.
    """
    prepare_environment()
    from mlflow import MlflowClient

    uri = uri or tracking_uri(root)
    if is_embedded(uri):
        _create(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(client: MlflowClient, name: str) -> str:
    """The id of the experiment called `name`, made if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        uri = client.tracking_uri
        where = None
        if is_embedded(uri):
            where = str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / name)
        try:
            return str(client.create_experiment(name, artifact_location=where, tags={KIND_TAG: KIND}))
        except MlflowException:
            # Another process may have made it in between.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is made if need be and left where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _create(file: Path) -> None:
    """Make the sqlite store beside its place and move it there, one process at a time.

    Several processes on one fresh file break each other's migrations, and a process killed in mid-migration
    would leave a store that no later one can open.
    """
    if file.exists():
        return
    with locked(file.with_name(f".{file.name}.lock")):
        if file.exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        beside = file.with_name(f".{file.name}.new")
        beside.unlink(missing_ok=True)
        with _quiet("mlflow.store.db.utils", "alembic"):
            store = SqlAlchemyStore(f"sqlite:///{beside}", str(file.parent / "mlartifacts"))
        store.engine.dispose()
        beside.replace(file)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.WARNING)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
