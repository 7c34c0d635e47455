from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from pipeline.errors import ConfigError, DataError, TrefoilError
from pipeline.tracking import NullTracker, Tracker, connect, metric_name, sync
from pipeline.tracking import tracker as module
from pipeline.tracking.journal import Journal, entries, read_state, write_state
from pipeline.tracking.sender import send


@pytest.fixture
def refused() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def begin(store: Path, tmp_path: Path, name: str = "run", **more: object) -> Tracker:
    return Tracker.start(name, run_dir=tmp_path / name, root=store, experiment=tmp_path.name, every_s=0.05, **more)  # type: ignore[arg-type]


def test_a_whole_run_arrives(store: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "signature.json").write_text("[]")
    (tmp_path / "artifact" / "linked.json").symlink_to("../plan.json")
    parent = begin(store, tmp_path, "wave")
    with begin(
        store, tmp_path, "hf", parent=parent, tags={"code": "abc"}, params={"optimizer": {"lr": 0.1}}
    ) as tracker:
        for step in range(3):
            tracker.log_metrics({metric_name("hf", "click", "auc"): 0.5 + step / 10, "loss": float("nan")}, step=step)
        tracker.log_artifact(tmp_path / "plan.json")
        tracker.log_artifact(tmp_path / "artifact", to="model")
        tracker.log_text("hello", "note.txt", to="notes")
        tracker.log_figure(Figure(), "curve.png")
        tracker.log_dataset("logs", digest="0123456789abcdef", source="/data/logs", context="training")
    assert parent.finish()
    client = connect(store)
    run = client.get_run(str(tracker.run_id))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "hf")
    assert run.data.params == {"optimizer.lr": "0.1"}
    assert run.data.tags["code"] == "abc"
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("logs", "0123456789abcdef")
    assert used.dataset.source == '{"uri": "/data/logs"}'
    assert [(t.key, t.value) for t in used.tags] == [("mlflow.data.context", "training")]
    history = client.get_metric_history(run.info.run_id, "val/hf/click/auc")
    assert [(m.step, m.value) for m in history] == [(0, 0.5), (1, 0.6), (2, 0.7)]
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"plan.json", "model", "notes", "curve.png"}
    inside = [f.path for f in client.list_artifacts(run.info.run_id, "model")]
    assert inside == ["model/linked.json", "model/signature.json"]
    assert not list((tmp_path / "hf" / "tracking" / "files").iterdir())
    # The child may have been sent before its parent was: the link is made at the latest when it is synced.
    sync(tmp_path / "hf")
    assert client.get_run(run.info.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_a_run_says_who_made_it_and_by_what(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    monkeypatch.setattr("sys.argv", ["/opt/bin/trefoil", "train"])
    monkeypatch.setattr("__main__.__spec__", None)
    script = begin(store, tmp_path, "script")
    # A job of TorchX, as a user without a name, by `python -m pipeline.cli`.
    monkeypatch.setattr("getpass.getuser", lambda: {}["uid"])
    monkeypatch.setenv("TORCHX_JOB_ID", "slurm://torchx/9")
    monkeypatch.setattr("__main__.__spec__", ModuleSpec("pipeline.cli.__main__", None))
    job = begin(store, tmp_path, "job")
    assert script.finish()
    assert job.finish()
    origins = []
    for run in (script, job):
        tags = connect(store).get_run(str(run.run_id)).data.tags
        origins.append([tags[f"mlflow.{name}"] for name in ("user", "source.name", "source.type")])
    assert origins == [["ada", "trefoil", "LOCAL"], [f"user {os.getuid()}", "pipeline.cli", "JOB"]]


def test_an_error_or_interrupt_ends_the_run_as_such(store: Path, tmp_path: Path) -> None:
    for name, error, status in (("a", ValueError, "FAILED"), ("b", KeyboardInterrupt, "KILLED")):
        tracker = begin(store, tmp_path, name)
        with pytest.raises(error), tracker:
            raise error
        assert connect(store).get_run(str(tracker.run_id)).info.status == status


def test_a_restarted_run_goes_on_as_the_same_run(store: Path, tmp_path: Path) -> None:
    first = begin(store, tmp_path)
    first.log_metrics({"loss": 2.0}, step=1)
    assert first.flush()
    first.finish("KILLED")
    with (tmp_path / "run" / "tracking" / "journal.jsonl").open("a") as journal:
        journal.write('{"kind": "metrics", "va')  # what a process leaves that dies while writing
    second = begin(store, tmp_path)
    second.log_metrics({"loss": 1.0}, step=2)
    assert second.finish()
    assert (second.key, second.run_id) == (first.key, first.run_id)
    run = connect(store).get_run(str(first.run_id))
    assert run.info.status == "FINISHED"
    assert [m.value for m in connect(store).get_metric_history(run.info.run_id, "loss")] == [2.0, 1.0]


def test_sending_again_changes_nothing(store: Path, tmp_path: Path) -> None:
    """The answer to everything was lost: all is sent a second time, and there is still one of each."""
    tracker = begin(store, tmp_path, tags={"a": "1"}, params={"p": 1})
    for step in range(20):
        tracker.log_metrics({"loss": step / 2, "other": 1.0}, step=step)
    assert tracker.finish()
    spool = tmp_path / "run" / "tracking"
    (spool / "sent.json").unlink()
    again = sync(tmp_path / "run")
    assert again.run_id == tracker.run_id
    assert again.entries == 24
    assert sync(spool).entries == 0
    client = connect(store)
    assert len(client.search_runs([client.get_run(again.run_id).info.experiment_id])) == 1
    assert [m.step for m in client.get_metric_history(again.run_id, "loss")] == list(range(20))


def test_a_refused_server_blocks_nobody_and_loses_nothing(
    store: Path, tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refused)
    caplog.set_level(logging.WARNING)
    tracker = begin(store, tmp_path)
    for step in range(50):
        tracker.log_metrics({"loss": float(step)}, step=step)
    assert not tracker.flush()
    assert not tracker.finish()
    assert tracker.run_id is None
    assert "trefoil sync" in caplog.text
    with pytest.raises(TrefoilError, match="did not take all"):
        sync(tmp_path / "run")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sent = sync(tmp_path / "run", uri=f"sqlite:///{store / 'mlflow.db'}")
    history = connect(store).get_metric_history(sent.run_id, "loss")
    assert [m.step for m in history] == list(range(50))
    assert connect(store).get_run(sent.run_id).info.status == "FINISHED"


def test_the_caller_never_touches_a_silent_server(
    store: Path, tmp_path: Path, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call returns while the sending thread still waits for its first answer."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    tracker = begin(store, tmp_path)
    for step in range(1000):
        tracker.log_metrics({"loss": float(step)}, step=step)
    tracker.log_text("kept", "note.txt")
    assert not tracker.finish(patience_s=0.1)
    assert tracker._thread.is_alive()
    assert tracker._attempts == 0
    written = [entry for entry, _ in entries(tmp_path / "run" / "tracking")]
    assert [entry["kind"] for entry in written] == ["run", "tags", *["metrics"] * 1000, "artifact", "finished"]


def test_what_mlflow_refuses_for_good_is_set_aside(store: Path, tmp_path: Path) -> None:
    tracker = begin(store, tmp_path, params={"p": 1})
    tracker.log_params({"p": 2, "q": 3})  # MLflow does not change a parameter
    tracker.log_metrics({"good": 1.0, "b|a|d": 2.0}, step=0)
    tracker.log_metrics({"good": 2.0}, step=1)
    assert tracker.finish()
    run = connect(store).get_run(str(tracker.run_id))
    assert run.data.params == {"p": "1", "q": "3"}
    assert run.data.metrics == {"good": 2.0}
    refused = [json.loads(line) for line in (tmp_path / "run/tracking/rejected.jsonl").read_text().splitlines()]
    assert [r["entry"]["values"] for r in refused] == [{"p": "2"}, {"b|a|d": 2.0}]


def test_the_sender_takes_a_small_share_of_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After 10 ms of computing it pauses 2 s; a failure doubles the pause, to a minute at most."""
    computed = iter([0.0, 0.01, 0.01, 0.01, 0.01, 0.02, 0.02, 2.0, 2.0, 2.0, *[2.0] * 9])
    outcomes = [None, None, None, None, *[ConnectionError("gone")] * 3]
    tracker = Tracker(tmp_path, root=tmp_path, uri="sqlite:///unused.db", every_s=0.05)
    pauses: list[float] = []

    def sending(*_: object, **__: object) -> None:
        outcome = outcomes[len(pauses)]
        if outcome is not None:
            raise outcome

    def waiting(seconds: float) -> None:
        pauses.append(seconds)
        tracker._closing = len(pauses) == len(outcomes) - 1

    monkeypatch.setattr(module, "send", sending)
    monkeypatch.setattr(module.time, "thread_time", lambda: next(computed))
    monkeypatch.setattr(tracker._wake, "wait", waiting)
    tracker._work()
    tracker._journal.close()
    assert pauses == [pytest.approx(2.0), 0.05, pytest.approx(2.0), 30.0, 60.0, 60.0]


def test_only_rank_zero_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with begin(tmp_path, tmp_path) as by_environment:
        by_environment.log_metrics({"loss": 1.0}, step=0)
        by_environment.log_artifact(tmp_path / "nothing")
    assert isinstance(by_environment, NullTracker)
    assert isinstance(begin(tmp_path, tmp_path, rank=0, enabled=False), NullTracker)
    assert by_environment.finish()
    assert not list(tmp_path.iterdir())


def test_the_null_tracker_silences_every_recording_call() -> None:
    called = {
        name for name, value in vars(Tracker).items() if not name.startswith("_") and name not in ("start", "live")
    }
    assert called <= set(vars(NullTracker))


def test_unusable_arguments(store: Path, tmp_path: Path) -> None:
    tracker = begin(store, tmp_path)
    with pytest.raises(DataError, match="not there"):
        tracker.log_artifact(tmp_path / "none")
    with pytest.raises(ConfigError, match="give a Matplotlib or Plotly figure"):
        tracker.log_figure(3, "three.png")
    with pytest.raises(ConfigError, match="did you mean 'FINISHED'"):
        tracker.finish("FINISH")
    assert tracker.finish()
    with pytest.raises(DataError, match="no run was journalled"):
        sync(tmp_path)


def test_a_password_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refused.replace("http://", "http://ada:secret@"))
    begin(tmp_path, tmp_path).finish()
    journal = tmp_path / "run" / "tracking" / "journal.jsonl"
    assert "secret" not in journal.read_text()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
        sync(tmp_path / "run")


def test_metrics_go_in_batches_of_the_size_that_mlflow_takes(tmp_path: Path) -> None:
    """Only whole entries are sent; 2,500 values in entries of 5 need three calls, and one large entry two."""
    calls: list[int] = []

    class Client:
        def log_batch(self, run_id: str, *, metrics: list) -> None:
            assert run_id == "r"
            calls.append(len(metrics))

    journal = Journal(tmp_path)
    journal.append("run", key="k", name="n", experiment="e", parent=None, uri=None)
    start = journal.size
    for step in range(500):
        journal.append("metrics", step=step, values={f"m{i}": 0.0 for i in range(5)})
    journal.append("metrics", step=500, values={f"m{i}": 0.0 for i in range(1500)})
    journal._file.write(b'{"kind": "metr')
    state = read_state(tmp_path)
    write_state(tmp_path, type(state)(offset=start, run_id="r"))
    sent = send(tmp_path, lambda: Client())  # type: ignore[arg-type, return-value]
    assert calls == [1000, 1000, 500, 1000, 500]
    assert sent.entries == 501
    journal.close()
