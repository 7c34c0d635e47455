"""`mlflow models serve` answers over HTTP on loopback with the scorer's own probabilities."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.serve.artifact import ArtifactInfo
from pipeline.serve.mlflow_model import example_rows, save_model
from pipeline.serve.scorer import Scorer

START_S = 240


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no answer in {START_S} s")


@pytest.mark.slow
def test_a_served_model_answers(artifact: Callable[[str, str], ArtifactInfo], scorer: Scorer, tmp_path: Path) -> None:
    info = artifact("sr", "fp32")
    save_model(info, tmp_path / "model")
    rows, port = example_rows(info.signature), free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(tmp_path / "model")]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    paths = os.pathsep.join(p for p in (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")) if p)
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": paths}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # A session of its own, so that its workers end with it.
    server = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True)
    try:
        wait_for(port, server)

        def ask(frame: object) -> dict:
            body = json.dumps({"dataframe_split": frame}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", data=body, headers={"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())

        split = json.loads(rows.to_json(orient="split", index=False))
        expected = scorer.score(rows).to_pandas()
        found = ask(split)["predictions"]
        for task in expected.columns:
            np.testing.assert_allclose([row[task] for row in found], expected[task], atol=1e-6)
        at = split["columns"].index("item")
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask({"columns": split["columns"], "data": [[*r[:at], 10**6, *r[at + 1 :]] for r in split["data"]]})
        assert "holds 1000000; ids of vocabulary 'item'" in refused.value.read().decode()
        missing = {"columns": split["columns"][:at] + split["columns"][at + 1 :]}
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(missing | {"data": [r[:at] + r[at + 1 :] for r in split["data"]]})
        assert "item" in refused.value.read().decode()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
