"""Planted files of every kind: nothing of them runs, and nothing outside their folder is read or written."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import config_from_json, config_to_json
from pipeline.data.ingest import load_spec
from pipeline.data.logs import Dataset
from pipeline.errors import ArtifactError, CheckpointError, ConfigError, DataError, RegistryError, TrefoilError
from pipeline.recipes import find
from pipeline.rollout.plan import plan_text, read_plan
from pipeline.rollout.registry import Registry
from pipeline.serve.artifact import check_folder, write_manifest
from pipeline.serve.vetting import vet_program
from pipeline.sweep.space import read_space
from pipeline.tracking import Tracker, sync
from pipeline.train import checkpoint
from pipeline.train.checkpoint import files
from pipeline.train.checkpoint.shards import Reader
from tests.data.logs import rewrite, write_log
from tests.rollout.plans import plan
from tests.sweep.test_study import CONFIG, SPACE
from tests.train.runs import tiny_config

IMPORTING = json.dumps(
    [1, {"type": "builtins.dict", "context": json.dumps([{"__enum__": True, "fqn": "os:x"}]), "children_spec": []}]
)
YAML_CODE = "!!python/object/apply:os.system ['touch {ran}']"


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.ran}",)


@pytest.fixture
def ran(tmp_path: Path) -> Iterator[Path]:
    """A file that code which runs would make; it is not there in the end."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    write_log(tmp_path / "log", {"hf": 12})
    return tmp_path / "log"


# Programs


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound program of a small model."""
    from pipeline.serve.export import example_tensors
    from pipeline.serve.program import export_program, save_program
    from tests.faults.targets.serving import served_model, small_signature

    path = tmp_path_factory.mktemp("program") / "model.pt2"
    save_program(export_program(served_model()[1], example_tensors(small_signature())), path)
    vet_program(path)
    return path


def rewritten(program: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    with zipfile.ZipFile(program) as archive:
        parts = {n: archive.read(n) for n in archive.namelist()}
    change(parts)
    with zipfile.ZipFile(program, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def in_graph(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes]], None]:
    def whole(parts: dict[str, bytes]) -> None:
        name = next(n for n in parts if n.endswith("models/model.json"))
        graph = json.loads(parts[name])
        change(graph)
        parts[name] = json.dumps(graph).encode()

    return whole


def call(target: str, **argument: Any) -> Callable[[dict[str, Any]], None]:
    node = {
        "target": target,
        "inputs": [{"name": "x", "arg": argument, "kind": 1}],
        "outputs": [],
        "metadata": {},
        "is_hop_single_tensor_return": None,
        "name": "x",
    }
    return lambda graph: graph["graph_module"]["graph"]["nodes"].insert(0, node)


def size(text: str) -> Callable[[dict[str, Any]], None]:
    def change(graph: dict[str, Any]) -> None:
        sizes = graph["graph_module"]["graph"]["sym_int_values"]
        next(v for v in sizes.values() if "as_expr" in v)["as_expr"]["expr_str"] = text

    return change


def weights(change: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, bytes]], None]:
    """Change the list of weights; `change` gives its text."""

    def whole(parts: dict[str, bytes]) -> None:
        name = next(n for n in parts if n.endswith("model_weights_config.json"))
        parts[name] = change(json.loads(parts[name])).encode()

    return whole


def pickled_weights(ran: Path, flag: str) -> Callable[[dict[str, bytes]], None]:
    def whole(parts: dict[str, bytes]) -> None:
        weights(lambda config: json.dumps(config).replace('"use_pickle": false', flag))(parts)
        for name in [n for n in parts if "/weights/weight_" in n]:
            parts[name] = pickle.dumps(Bomb(ran))

    return whole


def program_faults(ran: Path) -> dict[str, Callable[[dict[str, bytes]], None]]:
    evil = f"__import__('os').system('touch {ran}')"
    return {
        "size that is code": in_graph(size(evil)),
        "size that calls": in_graph(size(f"Add(Integer(1), open('{ran}', 'w'))")),
        "guard that is code": in_graph(lambda g: g["guards_code"].append(evil)),
        "os.system": in_graph(call("torch.hub.os.system", as_string=f"touch {ran}")),
        "an attribute of an operation": in_graph(call("torch.ops.aten.__class__.__init__", as_int=1)),
        "a library": in_graph(call("torch.ops.load_library", as_string=str(ran))),
        "a file read or made": in_graph(call("torch.ops.aten.from_file.default", as_string=str(ran))),
        "a file by another operation": in_graph(call("torch.ops.fbgemm.anything.default", as_string=str(ran))),
        "an object": in_graph(call("torch.ops.aten.add.Tensor", as_custom_obj={"name": "x", "class_fqn": "y"})),
        "an import by an enumeration": in_graph(
            lambda g: g["graph_module"]["module_call_graph"][0].update(
                signature={
                    "inputs": [],
                    "outputs": [],
                    "in_spec": IMPORTING,
                    "out_spec": "",
                    "forward_arg_names": None,
                }
            )
        ),
        "pickled weights": pickled_weights(ran, '"use_pickle": true'),
        "pickled weights, spaced": pickled_weights(ran, '"use_pickle"\n:\ttrue'),
        "pickled weights, escaped": pickled_weights(ran, '"use_\\u0070ickle": true'),
        "pickled weights, as a number": pickled_weights(ran, '"use_pickle": 1'),
        "weights elsewhere": weights(lambda c: json.dumps(c).replace("weight_0", "../../weight_0")),
        "a pickled sample": lambda p: p.update({"model/data/sample_inputs/model.pt": pickle.dumps(Bomb(ran))}),
        "a pickled object": lambda p: p.update({"model/data/constants/custom_obj_0": pickle.dumps(Bomb(ran))}),
        "machine code": lambda p: p.update({"model/data/aotinductor/model/x.so": b"\x7fELF"}),
        "the format of before": lambda p: p.update({"version": b"8.20", "serialized_state_dict.pt": b"x"}),
    }


@pytest.mark.parametrize("name", list(program_faults(Path("x"))))
def test_a_program_that_is_more_than_a_graph_is_refused(program: Path, tmp_path: Path, ran: Path, name: str) -> None:
    path = tmp_path / "model.pt2"
    shutil.copy(program, path)
    rewritten(path, program_faults(ran)[name])
    with pytest.raises(ArtifactError, match=r"is not loaded|cannot be loaded|holds a pickle"):
        vet_program(path)


def test_two_readers_must_agree_on_a_program(program: Path, tmp_path: Path) -> None:
    """Another archive behind the first: Python's reader would see one, torch's another."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("version", "8.20")
    path = tmp_path / "model.pt2"
    path.write_bytes(program.read_bytes() + inner.getvalue())
    with pytest.raises(ArtifactError):
        vet_program(path)


# Checkpoints


def test_a_pickle_under_the_name_of_plain_tensors_is_not_one(ran: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb(ran)))
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(CheckpointError):
        checkpoint.load_task(path)
    header = b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError):
        checkpoint.load_task(path)


@pytest.mark.parametrize("protocol", range(6))
def test_an_index_that_would_run_code_does_not(ran: Path, tmp_path: Path, protocol: int) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb(ran), protocol=protocol))
    with pytest.raises(CheckpointError, match="which no index holds"):
        Reader(str(tmp_path)).read_metadata()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "torch.load", "torch.hub.load", "torch.serialization.load", "functools.partial"]
)
def test_an_index_names_no_function(ran: Path, tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    code = f"c{module}\n{function}\n(S'{ran}'\ntR.".encode()
    (tmp_path / ".metadata").write_bytes(code)
    with pytest.raises(CheckpointError, match="which no index holds"):
        Reader(str(tmp_path)).read_metadata()


def test_a_forged_index_cannot_fill_the_memory(tmp_path: Path) -> None:
    """Nothing, remembered as the 67 millionth value: C's unpickler makes room for all before it."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x04Nr" + struct.pack("<I", 1 << 26) + b".")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="is no index of tensors"):
            Reader(str(tmp_path)).read_metadata()
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


# Texts


def test_texts_run_nothing(ran: Path, tmp_path: Path) -> None:
    code = YAML_CODE.format(ran=ran)
    readers: dict[str, Callable[[Path], Any]] = {
        "space": lambda p: read_space(p, CONFIG),
        "plan": read_plan,
        "spec": lambda p: load_spec(p, {}),
    }
    for name, read in readers.items():
        path = tmp_path / f"{name}.yaml"
        for text in (code, f"name: {code}\n", f"? {code}\n: 1\n"):
            path.write_text(text)
            with pytest.raises(ConfigError):
                read(path)


def test_a_recipe_in_json_is_data(ran: Path, tmp_path: Path) -> None:
    config = json.loads(config_to_json(tiny_config()))
    config["name"] = f"__import__('os').system('touch {ran}')"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find(str(tmp_path / "config.json"))().name == config["name"]
    with pytest.raises(ConfigError, match="extra: "):
        config_from_json(json.dumps(config | {"extra": 1}).encode(), source="config.json")


@pytest.mark.parametrize("text", ["a: 2026-13-45", "&a [*a]", "a: " + "[" * 5000, "\xff", "1:99:99:", "a: !!set 3"])
def test_what_a_yaml_parser_stumbles_over_is_one_error(tmp_path: Path, text: str) -> None:
    for name, read in (("space", lambda p: read_space(p, CONFIG)), ("plan", read_plan), ("spec", load_spec)):
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(text.encode("latin1"))
        with pytest.raises(ConfigError):
            read(path)


def test_aliases_cannot_fill_the_memory(tmp_path: Path) -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "spec.yaml").write_text("\n".join(["a0: &a0 [x]", *levels]))
    with pytest.raises(ConfigError, match="aliases stand for more than"):
        load_spec(tmp_path / "spec.yaml")
    (tmp_path / "space.yaml").write_text(SPACE)
    assert read_space(tmp_path / "space.yaml", CONFIG)
    (tmp_path / "plan.yaml").write_text(plan_text(plan()))
    assert read_plan(tmp_path / "plan.yaml") == plan()


# Paths


def outside(log: Path, tmp_path: Path, how: str) -> str:
    """A file of the log moved outside its folder, and the path by which the description names it."""
    file = Dataset.open(log).description.partitions[0].files[0].path
    secret = tmp_path / "secret.parquet"
    shutil.move(log / file, secret)
    if how == "link":
        (log / file).symlink_to(secret)
        return file
    if how == "folder link":
        (log / "linked").symlink_to(tmp_path)
        return "linked/secret.parquet"
    return {"parent": "../secret.parquet", "inside": "surface=hf/../../secret.parquet", "absolute": str(secret)}[how]


@pytest.mark.parametrize("how", ["link", "folder link", "parent", "inside", "absolute"])
def test_a_log_names_no_file_outside_its_folder(log: Path, tmp_path: Path, how: str) -> None:
    path = outside(log, tmp_path, how)
    rewrite(log, lambda d: d["partitions"][0]["files"][0].update(path=path))
    with pytest.raises(DataError, match="a file outside its folder"):
        Dataset.open(log)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "linked"])
def test_an_artifact_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "model.pt2").write_text("x")
    write_manifest(folder, {})
    if name == "linked":
        (folder / "linked").symlink_to(tmp_path / "secret")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["model.pt2"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="names a file outside its folder"):
        check_folder(folder, ("model.pt2",), what="artifact")


def test_a_name_longer_than_any_file_s_is_a_file_that_is_not_there(log: Path, tmp_path: Path) -> None:
    """In a log, an artifact and a checkpoint alike."""
    name = "a" * 300
    rewrite(log, lambda d: d["partitions"][0]["files"][0].update(path=name))
    with pytest.raises(DataError, match="a file that is not there"):
        Dataset.open(log)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.pt2").write_text("x")
    write_manifest(folder, {})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["model.pt2"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="lacks its file aaa"):
        check_folder(folder, ("model.pt2",), what="artifact")
    files.write_manifest(folder, {name: (1, "0")})
    with pytest.raises(CheckpointError, match="aaa is missing"):
        checkpoint.verify(folder)


# Secrets


class Failing(BaseHTTPRequestHandler):
    """Answers everything with 500."""

    def do_GET(self) -> None:
        self.send_response(500)
        self.end_headers()

    do_POST = do_PATCH = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def failing() -> Iterator[str]:
    """Address of a server that answers 500."""
    server = HTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def refusing() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["failing", "refusing"])
def test_passwords_reach_no_file_log_or_error(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    address = request.getfixturevalue(kind)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:hunter2@{address}")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2")
    caplog.set_level(logging.DEBUG)
    tracker = Tracker.start("run", run_dir=tmp_path / "run", root=tmp_path, every_s=0.05, params={"p": 1})
    tracker.log_metrics({"loss": 1.0}, step=1)
    assert not tracker.finish()
    said = []
    with pytest.raises(TrefoilError) as synced:
        sync(tmp_path / "run", uri=f"http://ada:hunter2@{address}")
    with pytest.raises(RegistryError) as registered:
        Registry(tmp_path).aliases("hf")
    said += [str(synced.value), str(registered.value), caplog.text, *capfd.readouterr()]
    written = [p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file()]
    assert not [text for text in (*said, *written) if "hunter2" in text]


def test_a_password_does_not_reach_status_or_screen(tmp_path: Path, refusing: str) -> None:
    code = """
import sys
from pipeline.cli import main
sys.exit(main(["rollout", "status"]))
"""
    (tmp_path / "plan.yaml").write_text(plan_text(plan()))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MLFLOW_TRACKING_URI": f"http://ada:hunter2@{refusing}", "TREFOIL_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
