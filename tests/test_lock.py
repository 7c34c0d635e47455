"""The locks: every package has the hashes of its files, and locking again forgets none that still holds."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet

FOLDER = Path(__file__).parents[1] / "requirements"
LOCKS = ("cpu.lock", "cuda.txt", "cuda-libraries.txt")


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", FOLDER / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_a_hash_and_no_place(lock: ModuleType, name: str) -> None:
    text = (FOLDER / name).read_text()
    found = lock.read(FOLDER / name)
    assert len(found) == text.count("==") > 10
    assert sum(len(hashes) for _, hashes in found.values()) == text.count("--hash=sha256:")
    assert all(hashes for _, hashes in found.values())
    assert "://" not in text, "the same files lie on many indexes"


def test_both_locks_differ_in_fbgemm_alone(lock: ModuleType) -> None:
    cpu, cuda, libraries = (lock.read(FOLDER / name) for name in LOCKS)
    assert cpu.keys() ^ cuda.keys() == {"fbgemm-gpu", "fbgemm-gpu-cpu"}
    both = cpu.keys() & cuda.keys() - {"torch"}
    assert {n: cpu[n] for n in both} == {n: cuda[n] for n in both}
    assert cpu["torch"][0] == cuda["torch"][0]
    assert cuda["torch"][1] < cpu["torch"][1], "all but its CPU builds"
    assert cpu["fbgemm-gpu-cpu"][0] == cuda["fbgemm-gpu"][0]
    assert not libraries.keys() & cpu.keys()
    assert f"torch {cpu['torch'][0]} " in (FOLDER / LOCKS[2]).read_text()


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0"])
def test_packages_run_on_the_first_release_of_every_python(lock: ModuleType, python: str) -> None:
    """Debian 12 has 3.11.2, and a package that wants 3.11.5 ends its set-up."""
    locked = [d for d in distributions() if re.sub(r"[-_.]+", "-", d.name).lower() in lock.read(FOLDER / LOCKS[0])]
    assert len(locked) > 100
    refuse = [d.name for d in locked if not SpecifierSet(d.metadata.get("Requires-Python") or "").contains(python)]
    assert refuse == []


def test_hashes_of_a_version_are_kept_and_those_of_another_are_not(lock: ModuleType, tmp_path: Path) -> None:
    before = {"a": ("1.0", {"0" * 64}), "b": ("1.0", {"1" * 64}), "c": ("1.0", {"2" * 64})}
    lock.write(tmp_path / "lock", before, "# a note")
    assert lock.read(tmp_path / "lock") == before
    now = {"a": ("1.0", {"3" * 64}), "b": ("2.0", {"4" * 64})}
    assert lock.merged(now, lock.read(tmp_path / "lock")) == {
        "a": ("1.0", {"0" * 64, "3" * 64}),
        "b": ("2.0", {"4" * 64}),
    }
    assert lock.read(tmp_path / "none") == {}
    with pytest.raises(SystemExit, match="no SHA-256 of a"):
        lock.write(tmp_path / "lock", {"a": ("1.0", set())})


def test_what_pip_says_of_a_package(lock: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names as indexes spell them, a version and its build, a folder without a hash."""
    report = """{"install": [
        {"metadata": {"name": "Torch_X.y", "version": "2.0+cpu"},
         "download_info": {"url": "u", "archive_info": {"hashes": {"sha256": "ab"}}}},
        {"metadata": {"name": "ours", "version": "1"}, "download_info": {"url": "file:///x", "dir_info": {}}}]}"""
    monkeypatch.setattr(lock.subprocess, "run", lambda *_, **__: lock.subprocess.CompletedProcess([], 0, report))
    found = lock.resolve()
    assert found == {"torch-x-y": ("2.0+cpu", {"ab"}), "ours": ("1", set())}
    assert lock.released(found) == {"torch-x-y": ("2.0", {"ab"}), "ours": ("1", set())}
    assert lock.released(found, build="cpu") == {"torch-x-y": ("2.0", set()), "ours": ("1", set())}
