"""MLflow that refuses, hangs, dies in mid-answer, fails or is full: training ends as ever, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import job
from pipeline.errors import DataError, RegistryError, TrefoilError
from pipeline.rollout.registry import Registry
from pipeline.tracking import Tracker, connect, sync
from pipeline.tracking.journal import JOURNAL, Journal, entries
from tests.faults import work
from tests.faults.test_storage import mounted


class Bad(BaseHTTPRequestHandler):
    """Answers as the server's `manner` says."""

    def do_GET(self) -> None:
        manner = self.server.manner  # type: ignore[attr-defined]
        if manner == "hangs":
            time.sleep(5)
        if manner == "dies":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if manner == "babbles":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"<html>")
            return
        self.send_response(500)
        self.end_headers()

    do_POST = do_PATCH = do_DELETE = do_GET

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # who asked has gone
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a server of bad manners."""
    made = ThreadingHTTPServer(("127.0.0.1", 0), Bad)
    made.manner = request.param  # type: ignore[attr-defined]
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("server", ["fails", "hangs", "dies", "babbles"], indirect=True)
def test_training_ends_and_all_records_arrive_later(
    server: str, log: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("TREFOIL_HOME", str(tmp_path))
    config = replace(work.recipe(), epochs=1)
    result = job.run(config, log, tmp_path / "run", console=Console(file=io.StringIO()))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    assert result.checkpoint.name == "epoch-1-step-00000000"
    with pytest.raises(TrefoilError, match="did not take all"):
        sync(tmp_path / "run")
    with pytest.raises(RegistryError, match="could not read the aliases"):
        Registry(tmp_path).aliases("hf")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sent = sync(tmp_path / "run", uri=f"sqlite:///{store / 'mlflow.db'}")
    run = connect(store).get_run(sent.run_id)
    history = connect(store).get_metric_history(sent.run_id, "train/click/loss")
    assert run.info.status == "FINISHED"
    assert [m.step for m in history] == [4, 8, 11]


def test_a_store_on_a_full_disk_loses_nothing(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    database = (store / "mlflow.db").read_bytes()
    with mounted(tmp_path / "disk", f"size={len(database) // 1024 + 40}k") as disk:
        (disk / "mlflow.db").write_bytes(database)
        tracker = Tracker.start("run", run_dir=tmp_path / "run", root=disk, experiment="full", every_s=0.05)
        for step in range(3000):
            tracker.log_metrics({"loss": float(step)}, step=step)
        assert not tracker.finish()
        with pytest.raises(TrefoilError, match=r"(?s)did not take all.*(disk is full|disk I/O error)"):
            sync(tmp_path / "run")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        sent = sync(tmp_path / "run")
        history = connect(disk).get_metric_history(sent.run_id, "loss")
        assert [m.step for m in history] == list(range(3000))


def until_full(journal: Journal) -> int:
    """Write until the disk is full; the number of entries that were taken."""
    for step in range(10_000):
        try:
            journal.append("metrics", step=step, values={"loss": 0.5 + step})
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            return step
    raise AssertionError("the disk did not fill up")


def test_a_journal_on_a_full_disk_keeps_every_entry_whole(tmp_path: Path) -> None:
    """An entry that was taken is there, one that was not leaves no trace, and the next one fits again."""
    with mounted(tmp_path / "disk", "size=64k") as disk:
        journal = Journal(disk)
        filler = disk / "filler"
        filler.write_bytes(b"x" * 30_000)
        taken = until_full(journal)
        assert taken > 100
        filler.unlink()
        journal.append("finished", status="FINISHED")
        journal.close()
        found = [entry for entry, _ in entries(disk)]
    assert [e["step"] for e in found[:-1]] == list(range(taken))
    assert found[-1]["kind"] == "finished"


def test_a_damaged_journal_is_one_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("run", key="k", name="n", experiment="e", parent=None, uri=None)
    journal.close()
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes().replace(b'"kind"', b'"kynd"'))
    with pytest.raises(DataError, match="is no entry"):
        sync(tmp_path, uri="sqlite:///unused.db")
    path.write_bytes(path.read_bytes().replace(b'"kynd"', b'"kind"'))
    (tmp_path / "sent.json").write_text("{")
    with pytest.raises(DataError, match="remove it, and all records are sent once more"):
        sync(tmp_path, uri="sqlite:///unused.db")
