"""The tracker against a real server that dies in mid-run and comes back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipeline.tracking import Tracker, connect, sync

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# Ten seconds on an idle machine.
START_S = 240


class Server:
    """`mlflow server` on a free port of this machine, with a sqlite store under `root`."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.root, self.uri = root, f"http://127.0.0.1:{self.port}"
        connect(root, uri=f"sqlite:///{root / 'mlflow.db'}")

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.root / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.root / "artifacts")]
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        with (self.root / "server.log").open("a") as said:
            self.process = subprocess.Popen(
                command,
                cwd=self.root,
                start_new_session=True,
                env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=said,
                stderr=said,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=10):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError("the server did not come up: " + (self.root / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_a_server_killed_in_mid_run_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path / "server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    server.start()
    try:
        tracker = Tracker.start("run", run_dir=tmp_path / "run", root=tmp_path, every_s=0.05, params={"p": 1})
        for step in range(100):
            tracker.log_metrics({"loss": float(step), "other": step / 2}, step=step)
        assert tracker.flush()
        for step in range(100, 200):
            tracker.log_metrics({"loss": float(step), "other": step / 2}, step=step)
            if step == 150:
                server.kill()  # with requests under way
        tracker.log_text("kept", "note.txt")
        assert not tracker.flush()
        assert not tracker.finish()
        server.start()
        sent = sync(tmp_path / "run")
        assert (sent.run_id, sent.rejected) == (tracker.run_id, 0)
        assert sync(tmp_path / "run").entries == 0
        client = connect(tmp_path)
        for name, scale in (("loss", 1.0), ("other", 0.5)):
            history = client.get_metric_history(sent.run_id, name)
            assert [(m.step, m.value) for m in history] == [(step, step * scale) for step in range(200)]
        run = client.get_run(sent.run_id)
        assert (run.info.status, run.data.params) == ("FINISHED", {"p": "1"})
        assert [f.path for f in client.list_artifacts(sent.run_id)] == ["note.txt"]
        assert len(client.search_runs([run.info.experiment_id])) == 1
    finally:
        server.kill()
