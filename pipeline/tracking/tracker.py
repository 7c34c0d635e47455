"""What a run writes its records with."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from pipeline.errors import ConfigError, DataError, unknown, without_passwords
from pipeline.tracking import journal
from pipeline.tracking.journal import Journal
from pipeline.tracking.names import JOB_PARENT_TAG, JOB_PARENT_VARIABLE, JOB_TAG, JOB_VARIABLE, flatten, user_name
from pipeline.tracking.sender import send
from pipeline.tracking.store import connect, prepare_environment, tracking_uri, without_secrets

log = logging.getLogger(__name__)
STATUSES = ("FINISHED", "FAILED", "KILLED")
_LONGEST_WAIT_S = 60.0
# The sender computes under Python's lock, which training wants too. It pauses until what it computed is no more than
# this share of the time; what was recorded meanwhile goes in one batch, which costs little more than one record.
_SHARE, _LONGEST_PAUSE_S = 0.005, 30.0


class Tracker:
    """One run: every call writes to the run's journal and returns; a thread sends the journal to MLflow.

    Make one with `Tracker.start`. Used as a context manager it finishes by itself, as FAILED or KILLED when an
    error or an interrupt passes through.
    """

    _living: ClassVar[list[Tracker]] = []

    def __init__(self, spool: Path, *, root: Path, uri: str, every_s: float) -> None:
        self._root, self._uri, self._every_s = root, uri, every_s
        self._journal = Journal(spool)
        self._progress = threading.Condition()
        self._wake = threading.Event()
        self._closing = False
        self._attempts = 0
        self._client: Any = None
        self._thread = threading.Thread(target=self._work, name="trefoil-tracker", daemon=True)

    @classmethod
    def start(
        cls,
        name: str,
        *,
        run_dir: str | os.PathLike[str],
        root: str | os.PathLike[str],
        experiment: str = "trefoil",
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, object] | None = None,
        parent: Tracker | str | None = None,
        enabled: bool = True,
        rank: int | None = None,
        every_s: float = 1.0,
    ) -> Tracker:
        """Begin a run, or go on with the one whose journal is in `run_dir`. Never waits for a server.

        In a job of TorchX the run bears the job's handle as a tag, and is part of the run of the job that the launcher
        named as its parent, where it has no other.

        Args:
            name: shown in MLflow.
            run_dir: the run's own folder; the journal lies in its `tracking/`.
            root: folder of the embedded store, where `MLFLOW_TRACKING_URI` names no server.
            experiment: made if need be.
            tags: of the run.
            params: may be nested; stored by dotted name.
            parent: the run that this one is part of, in the same experiment: its tracker or that tracker's `key`.
            enabled: False gives a tracker that records nothing.
            rank: of this process, by default the environment's `RANK`; any but 0 gets a tracker that records nothing.
            every_s: least seconds between two sendings; where sending takes the processor long, it is done more
                rarely, until `flush` or the end asks for it.
        """
        rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        if not enabled or rank != 0:
            return NullTracker()
        prepare_environment()
        import mlflow  # noqa: F401  # here, because importing it in two threads at once is not safe

        uri, spool = tracking_uri(root), Path(run_dir) / "tracking"
        tracker = cls(spool, root=Path(root), uri=uri, every_s=every_s)
        if tracker._journal.size:
            tracker._journal.append("resumed")
        else:
            tracker._journal.append(
                "run",
                key=uuid.uuid4().hex,
                name=name,
                experiment=experiment,
                parent=parent.key if isinstance(parent, Tracker) else parent or os.environ.get(JOB_PARENT_VARIABLE),
                uri=without_secrets(uri),
            )
        tracker.set_tags({**_origin_tags(), **_job_tags(), **(tags or {})})
        tracker.log_params(params or {})
        tracker._thread.start()
        cls._living.append(tracker)
        return tracker

    @classmethod
    def live(cls) -> Tracker | None:
        """The run of this process that began first and is not finished."""
        return cls._living[0] if cls._living else None

    @property
    def key(self) -> str | None:
        """The run's own name, known before any server is; children give it as `parent`."""
        return str(next(journal.entries(self._journal.folder))[0]["key"])

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow has answered, which `flush` waits for."""
        return journal.read_state(self._journal.folder).run_id

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Record numbers at a step; `metric_name` makes the names of surfaces' metrics."""
        if values:
            self._journal.append("metrics", step=int(step), values={n: float(v) for n, v in values.items()})

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record parameters, nested ones by dotted name. MLflow refuses to change one that is recorded."""
        if params:
            self._journal.append("params", values=flatten(params))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""
        if tags:
            self._journal.append("tags", values={name: str(value) for name, value in tags.items()})

    def log_dataset(self, name: str, *, digest: str, source: str, context: str) -> None:
        """Tie the run to a data set, which MLflow then shows beside it and in comparisons.

        Args:
            name: shown in MLflow.
            digest: of its content.
            source: where it lies.
            context: what the run does with it, such as training.
        """
        self._journal.append("dataset", name=name, digest=digest, source=source, context=context)

    def log_artifact(self, path: str | os.PathLike[str], *, to: str | None = None) -> None:
        """Keep a file, or a folder's content, under the artifact folder `to`.

        It is taken by hard link: replace a logged file rather than write into it.

        Raises:
            DataError: there is no such file or folder.
        """
        if not Path(path).exists():
            raise DataError("an artifact that is not there cannot be logged", file=str(path))
        self._journal.append("artifact", file=self._journal.stage(Path(path)), to=to)

    def log_text(self, text: str, name: str, *, to: str | None = None) -> None:
        """Keep text as the artifact file `name`."""
        place = self._journal.place(name)
        place.write_text(text, encoding="utf-8")
        self._journal.append("artifact", file=str(place.relative_to(self._journal.folder)), to=to)

    def log_figure(self, figure: Any, name: str, *, to: str | None = None) -> None:
        """Keep a Matplotlib figure (`name` ends in .png, .svg, ...) or a Plotly one (.html) as an artifact."""
        place = self._journal.place(name)
        if hasattr(figure, "savefig"):
            figure.savefig(place)
        elif hasattr(figure, "write_html"):
            figure.write_html(place)
        else:
            raise ConfigError(f"{name} is a {type(figure).__name__}; give a Matplotlib or Plotly figure")
        self._journal.append("artifact", file=str(place.relative_to(self._journal.folder)), to=to)

    def flush(self, *, patience_s: float = 30.0) -> bool:
        """Wait until all that was recorded has arrived; False if it has not, because MLflow is down or slow."""
        target, deadline = self._journal.size, time.monotonic() + patience_s
        with self._progress:
            first = self._attempts
            while journal.read_state(self._journal.folder).offset < target:
                # The attempt under way may have begun before the last entry; the one after it saw them all.
                if self._attempts >= first + 2 or not self._thread.is_alive():
                    return False
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._wake.set()
                self._progress.wait(left)
        return True

    def finish(self, status: str = "FINISHED", *, patience_s: float = 30.0) -> bool:
        """End the run, which takes no more records; True if all have arrived. What has not stays on disk for `sync`.

        Args:
            status: FINISHED, FAILED or KILLED.
            patience_s: the longest wait for a server that answers slowly; one that does not answer is given up
                after one more attempt.

        Raises:
            ConfigError: there is no such status.
        """
        if status not in STATUSES:
            raise ConfigError(unknown("status", status, STATUSES))
        if self._closing:
            return self._arrived()
        self._living.remove(self)
        self._journal.append("finished", status=status)
        self._journal.close()
        self._closing = True
        self._wake.set()
        self._thread.join(patience_s)
        if not self._arrived():
            folder = self._journal.folder
            log.warning("MLflow has not taken all records of this run; send them by: trefoil sync %s", folder)
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = "KILLED" if kind is not None and issubclass(kind, KeyboardInterrupt) else "FAILED"
        self.finish("FINISHED" if kind is None else failed)

    def _arrived(self) -> bool:
        return journal.read_state(self._journal.folder).offset >= self._journal.size

    def _work(self) -> None:
        """Send what is new, again and again, and stop once the run is closing; wait longer after each failure."""
        wait = self._every_s
        failing = False
        while True:
            closing, begun = self._closing, time.thread_time()
            try:
                send(self._journal.folder, self._connect, on_progress=self._notify)
                pause = (time.thread_time() - begun) / _SHARE
                wait, failing = max(self._every_s, min(pause, _LONGEST_PAUSE_S)), False
            except Exception as cause:  # noqa: BLE001  # whatever a client raises: the run goes on, the journal keeps all
                level, why = logging.DEBUG if failing else logging.WARNING, without_passwords(cause)
                # A store's error goes on with the whole statement that failed.
                log.log(level, "MLflow does not answer, will retry: %s", why.partition("\n")[0])
                self._client = None
                wait, failing = min(max(wait, 0.5) * 2, _LONGEST_WAIT_S), True
            with self._progress:
                self._attempts += 1
                self._progress.notify_all()
            if closing:
                return
            self._wake.wait(wait)
            self._wake.clear()

    def _connect(self) -> Any:
        if self._client is None:
            self._client = connect(self._root, uri=self._uri)
        return self._client

    def _notify(self) -> None:
        with self._progress:
            self._progress.notify_all()


def _origin_tags() -> dict[str, str]:
    """What MLflow's pages show as who made a run, and by which program."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = Path(sys.argv[0]).name if module is None else module.name.removesuffix(".__main__")
    kind = "JOB" if JOB_VARIABLE in os.environ else "LOCAL"
    return {"mlflow.user": user_name(), "mlflow.source.name": program, "mlflow.source.type": kind}


def _job_tags() -> dict[str, str]:
    told = {JOB_TAG: JOB_VARIABLE, JOB_PARENT_TAG: JOB_PARENT_VARIABLE}
    return {tag: os.environ[variable] for tag, variable in told.items() if variable in os.environ}


class NullTracker(Tracker):
    """A tracker that records nothing: for ranks other than 0, and for runs that want no records."""

    def __init__(self) -> None:
        pass

    @property
    def key(self) -> str | None:
        return None

    @property
    def run_id(self) -> str | None:
        return None

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        pass

    def log_params(self, params: Mapping[str, object]) -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def log_dataset(self, name: str, *, digest: str, source: str, context: str) -> None:
        pass

    def log_artifact(self, path: str | os.PathLike[str], *, to: str | None = None) -> None:
        pass

    def log_text(self, text: str, name: str, *, to: str | None = None) -> None:
        pass

    def log_figure(self, figure: Any, name: str, *, to: str | None = None) -> None:
        pass

    def flush(self, *, patience_s: float = 30.0) -> bool:
        return True

    def finish(self, status: str = "FINISHED", *, patience_s: float = 30.0) -> bool:
        return True
