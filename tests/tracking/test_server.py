"""The tracker against a real server that dies in mid-run and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.overhead import Server
from pipeline.tracking import Tracker, connect, sync

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


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
