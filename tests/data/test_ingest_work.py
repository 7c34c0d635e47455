"""Restart, increments and bounded memory."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.ingest import ingest
from pipeline.data.ingest.stages import Stages
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError, DataError
from tests.data.ingest_logs import CAUSAL, DAY, random_log, rows, run, spec_with, write

T = 10_000 * DAY
FIRST = date(1970, 1, 1) + timedelta(days=10_000)


def full_spec(**changes: Any) -> dict[str, Any]:
    """Everything at once: causal features, similarity, earlier events, days by parameter."""
    earlier = {"files": ["${root}/before.parquet"], "user": "user", "items": "items", "last_time": "last"}
    return spec_with(
        **{
            "parameters": {"root": {}, "last": {"default": None}},
            "causal": {**CAUSAL, "similarity": {"dimension": 2}},
            "history": {**spec_with()["history"], "earlier": earlier},
            "days": {"timezone": "UTC", "last": "${last}"},
            **changes,
        }
    )


def write_before(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    # User 2's earlier events are stamped late: only requests after that may see them.
    lists = {
        "user": [1, 2, 3],
        "items": [["a", "b"], ["c", "d"], ["a", "d"]],
        "last": [T - 5, T + DAY + 600_000, T - 9],
    }
    pl.DataFrame(lists).write_parquet(root / "before.parquet")


def digest(dataset: Dataset) -> dict[str, str]:
    """Hash of every file of a log."""
    files = sorted(p for p in dataset.root.rglob("*") if p.is_file())
    return {str(p.relative_to(dataset.root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def without_state(files: dict[str, str]) -> dict[str, str]:
    """Files of the log itself: how a state is cut into files is a matter of the run."""
    return {path: text for path, text in files.items() if not path.startswith("state/")}


@pytest.mark.parametrize("die_at", ["_prepare", "_answer", "_requests"])
def test_restart_gives_identical_bytes_and_reuses_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: str
) -> None:
    write_before(tmp_path)
    monkeypatch.setattr("pipeline.data.ingest.run.bucket_count", lambda *_: 3)
    path = write(tmp_path, full_spec(), random_log(1, 200, users=12))
    params = {"root": str(tmp_path)}
    whole = ingest(path, tmp_path / "whole", params)
    calls = 0
    genuine = getattr(Stages, die_at)

    def dies(self: Stages, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            (arguments[-1] / "half").write_text("a torn file")
            raise KeyboardInterrupt
        genuine(self, *arguments)

    monkeypatch.setattr(Stages, die_at, dies)
    with pytest.raises(KeyboardInterrupt):
        ingest(path, tmp_path / "again", params)
    assert not (tmp_path / "again" / "dataset.json").exists()
    told: list[str] = []
    counted: list[tuple[int, int]] = []
    resumed = ingest(path, tmp_path / "again", params, told.append, count=lambda *n: counted.append(n))
    assert counted == sorted(counted)
    assert counted[-1][0] == counted[-1][1]
    assert counted[-2][0] == counted[-2][1] - 1  # but for the writing, which has no buckets
    assert digest(resumed) == digest(whole)
    assert not any("reading" in t for t in told)  # the input was not read again
    assert not (tmp_path / "again" / ".work").exists()


def test_any_number_of_processes_gives_identical_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_before(tmp_path)
    path = write(tmp_path, full_spec(), random_log(1, 200, users=12))
    params = {"root": str(tmp_path)}
    one = ingest(path, tmp_path / "one", params, keep_state=True)
    told: list[str] = []
    two = ingest(path, tmp_path / "two", params, told.append, keep_state=True, jobs=2)
    monkeypatch.setattr("pipeline.data.ingest.run.bucket_count", lambda *_: 5)
    three = ingest(path, tmp_path / "three", params, jobs=3)
    assert without_state(digest(one)) == without_state(digest(two)) == digest(three)
    assert "preparing 2/2" in told
    more = pl.concat([random_log(1, 200, users=12), random_log(2, 50).with_columns(pl.col("time") + 3 * DAY)])
    write(tmp_path, full_spec(), more)
    after = [ingest(path, tmp_path / f"next-{n}", params, previous=d.root, jobs=n) for d, n in ((two, 1), (one, 2))]
    assert rows(after[0]) == rows(after[1])


def _worker(path: Path, out: Path, root: Path, started: Any, dying: Any, told: Any) -> None:
    """One of two workers; with `dying` given, it dies in the middle of its first bucket of requests."""
    if dying is not None:

        def die(self: Stages, *arguments: Any) -> None:
            (arguments[-1] / "half").write_text("a torn file")
            dying.set()
            os.kill(os.getpid(), signal.SIGKILL)

        Stages._requests = die  # type: ignore[method-assign]
    started.wait()
    ingest(path, out, {"root": str(root)}, told, keep_state=True, workers=4)


@pytest.mark.parametrize("dies", [False, True])
def test_workers_that_share_the_work_give_identical_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    write_before(tmp_path)
    path, out = write(tmp_path, full_spec(), random_log(1, 200, users=12)), tmp_path / "shared"
    context = multiprocessing.get_context("spawn")
    started, told, dying = context.Barrier(2), context.SimpleQueue(), context.Event() if dies else None
    other = context.Process(target=_worker, args=(path, out, tmp_path, started, dying, told.put))
    other.start()
    with monkeypatch.context() as patch:
        if dying is not None:  # so that a bucket is left for the one that dies
            genuine = Stages._requests
            patch.setattr(Stages, "_requests", lambda *a: (dying.wait(60), genuine(*a)))
        _worker(path, out, tmp_path, started, None, told.put)
    other.join()
    assert other.exitcode == (-signal.SIGKILL if dies else 0)
    one = ingest(path, tmp_path / "one", {"root": str(tmp_path)}, keep_state=True)
    shared = Dataset.open(tmp_path / "shared")
    assert without_state(digest(shared)) == without_state(digest(one))
    assert [p.name for p in shared.root.iterdir() if p.name.startswith(".")] == []
    if not dies:  # each step was done once, by whichever came first
        said = []
        while not told.empty():
            said.append(told.get())
        assert len(said) == len(set(said))
        assert {f"building requests {n}/4" for n in range(1, 5)} <= set(said)
    # Who comes when all is done finds the log; another log's folder is refused.
    assert digest(ingest(path, shared.root, {"root": str(tmp_path)}, workers=4)) == digest(shared)
    write(tmp_path, full_spec(), random_log(2, 50))
    with pytest.raises(DataError, match="already holds a log"):
        ingest(path, shared.root, {"root": str(tmp_path)}, workers=4)


def test_who_does_not_share_or_works_on_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.ingest.work.SETTING_UP_S", 0.0)
    path = write(tmp_path, spec_with(), random_log(1, 50))
    other = path.with_name("other.yaml")
    other.write_text(path.read_text() + "\nweight: '2.0'\n")
    params, genuine, said = {"root": str(tmp_path)}, Stages._requests, []

    def meanwhile(self: Stages, *arguments: Any) -> None:
        for spec, workers in ((path, 1), (other, first)):
            with pytest.raises(DataError) as caught:
                ingest(spec, tmp_path / "out", params, workers=workers)
            said.append(str(caught.value))
        genuine(self, *arguments)

    monkeypatch.setattr(Stages, "_requests", meanwhile)
    first = 2
    ingest(path, tmp_path / "out", params, workers=first)
    assert "another ingest is at work in the folder" in said[0]
    assert "workers with another spec, other inputs or other flags are at work here" in said[1]
    with pytest.raises(ConfigError, match="workers is 0"):
        ingest(path, tmp_path / "none", params, workers=0)


def test_the_most_pairs_that_item_vectors_take_are_the_same_for_any_buckets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.ingest.similarity.MOST_PAIRS", 60)
    users, items = list(range(1, 41)), list("abcd")
    seen = [[items[u % 4], items[(u * 7 + u // 4) % 4], items[u // 3 % 4]] for u in users]
    path = write(tmp_path, full_spec(), random_log(1, 200, users=12))
    pl.DataFrame({"user": users, "items": seen, "last": [T - 5] * 40}).write_parquet(tmp_path / "before.parquet")
    found = []
    for buckets in (1, 4):
        monkeypatch.setattr("pipeline.data.ingest.run.bucket_count", lambda *_, n=buckets: n)
        found.append(digest(ingest(path, tmp_path / f"out-{buckets}", {"root": str(tmp_path)})))
    assert found[0] == found[1]


def test_errors_of_other_processes_arrive_whole(tmp_path: Path) -> None:
    spec = spec_with(vocabularies={**spec_with()["vocabularies"], "item": {"method": "given", "size": 5}})
    with pytest.raises(DataError, match=r"takes ids in \[0, 5\), the log has 'z'") as caught:
        run(tmp_path, spec, random_log(1, 40, users=9, items="z"), jobs=2)
    assert caught.value.column == "item"
    with pytest.raises(ConfigError, match="jobs is 0"):
        run(tmp_path, spec_with(), random_log(1, 20), "none", jobs=0)


def test_work_of_another_input_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, spec_with(), random_log(1, 50))
    with monkeypatch.context() as patch:
        patch.setattr(Stages, "_requests", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            ingest(path, tmp_path / "out", {"root": str(tmp_path)})
    log = random_log(2, 60)
    write(tmp_path, spec_with(), log)
    assert rows(ingest(path, tmp_path / "out", {"root": str(tmp_path)})) == rows(run(tmp_path / "b", spec_with(), log))


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10_000), delay_s=st.sampled_from([0, 1800, 86_400, 100_000]), gap_s=st.sampled_from([0, 60]))
def test_increments_equal_the_batch(
    tmp_path_factory: pytest.TempPathFactory, seed: int, delay_s: float, gap_s: float
) -> None:
    root = tmp_path_factory.mktemp("increments")
    write_before(root)
    log = random_log(seed, 150, users=5, days=4)
    spec = full_spec(label_delay_s=delay_s, request={"gap_s": gap_s})
    whole = rows(run(root, spec, log))
    path, parts, previous = root / "spec.yaml", [], None
    for day in range(4):
        params = {"root": str(root), "last": (FIRST + timedelta(days=day)).isoformat()}
        done = ingest(path, root / f"day-{day}", params, previous=previous, keep_state=True)
        parts += rows(done)
        previous = done.root
    assert parts == whole


def test_increments_refuse_another_spec_and_logs_without_state(tmp_path: Path) -> None:
    write_before(tmp_path)
    log = random_log(3, 60, days=1)
    done = run(tmp_path, full_spec(), log, keep_state=True)
    more = pl.concat([log, log.with_columns(pl.col("time") + DAY)])
    with pytest.raises(ConfigError, match="differs from that of the earlier log in label_delay_s"):
        run(tmp_path, full_spec(label_delay_s=5), more, "next", previous=done.root)
    second = run(tmp_path, full_spec(), more, "next", previous=done.root)
    assert second.days == ("1997-05-20",)
    with pytest.raises(DataError, match="no saved state"):
        run(tmp_path, full_spec(), more, "third", previous=second.root)
    with pytest.raises(DataError, match="no row of the log lies in the days"):
        run(tmp_path, full_spec(), log, "nothing new", previous=done.root)


def test_a_folder_that_holds_a_log_is_refused(tmp_path: Path) -> None:
    run(tmp_path, spec_with(), random_log(1, 20))
    with pytest.raises(DataError, match="already holds a log"):
        run(tmp_path, spec_with(), random_log(1, 20))


_CHILD = """
import json, os, re, sys
spec, out, root, memory, group = sys.argv[1:]
if group:
    open(group + "/cgroup.procs", "w").write(str(os.getpid()))
from pipeline.data.ingest import ingest
def peak():
    # ru_maxrss would count the parent's memory too, which the child had for a moment before exec.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
d = ingest(spec, out, {"root": root}, lambda what: print(what, peak(), flush=True), memory_gb=float(memory))
print(json.dumps([peak(), sum(p.impressions for p in d.description.partitions)]))
"""


class _Group:
    """A memory cgroup, version 1 or 2: the kernel kills what takes more."""

    def __init__(self, limit: int) -> None:
        """Raises OSError where none can be made: another system, not root, or cgroups that may only be read."""
        # With version 2 a group has the controller's files once its parent hands the controller on.
        v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        root, limited_by, most = (
            (v1, "memory.limit_in_bytes", "memory.max_usage_in_bytes")
            if v1.is_dir()
            else (v2, "memory.max", "memory.peak")
        )
        if root == v2:
            (v2 / "cgroup.subtree_control").write_text("+memory")
        self.path = root / f"trefoil-test-{os.getpid()}"
        self._most = self.path / most
        self.path.mkdir()
        try:
            (self.path / limited_by).write_text(str(limit))
        except OSError:
            self.path.rmdir()
            raise

    def peak(self) -> int:
        """The most that was charged to the group, page cache included."""
        return int(self._most.read_text())


@pytest.fixture
def limited() -> Iterator[Callable[[int], _Group | str]]:
    """Makes a memory cgroup, or says why there can be none.

    RLIMIT_AS and RLIMIT_DATA count what allocators reserve and never touch, several times what ingest takes.
    """
    made: list[Path] = []

    def make(limit: int) -> _Group | str:
        try:
            group = _Group(limit)
        except OSError as error:
            return str(error)
        made.append(group.path)
        return group

    yield make
    for path in made:
        path.rmdir()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_memory_stays_bounded_on_a_log_four_times_as_large(
    tmp_path: Path, limited: Callable[[int], _Group | str]
) -> None:
    """Twice over: the kernel gives it no more, and the peak is looked at."""
    memory_gb, rows_a_part, parts = 0.7, 100_000, 20
    names = [str(i) for i in range(5000)]
    items = pl.DataFrame({"id": names}).with_columns(
        author=pl.int_range(5000) % 700, tags=pl.format("{},{}", pl.int_range(5000) % 41, pl.int_range(5000) % 37)
    )
    spec = spec_with(log={"files": ["${root}/part-*.csv"]}, causal=CAUSAL)
    path = write(tmp_path, spec, random_log(0, 10), items)
    size = 0
    for i in range(parts):
        log = random_log(i, rows_a_part, users=100_000, minutes=1400, items=names)
        log = log.with_columns(unused=pl.lit("x" * 1500))  # as logs are: mostly columns that nobody reads here
        log.write_csv(tmp_path / f"part-{i:02d}.csv")
        size += (tmp_path / f"part-{i:02d}.csv").stat().st_size
    assert size >= 4 * memory_gb * 2**30
    group = limited(round(memory_gb * 2**30))
    where = str(group.path) if isinstance(group, _Group) else ""
    child = [sys.executable, "-c", _CHILD, str(path), str(tmp_path / "out"), str(tmp_path), str(memory_gb), where]
    done = subprocess.run(child, check=True, capture_output=True, text=True)
    peak, impressions = json.loads(done.stdout.splitlines()[-1])
    assert impressions > rows_a_part * parts / 2
    assert peak <= memory_gb * 2**30, done.stdout
    if isinstance(group, str):
        pytest.skip(f"the process kept to {memory_gb} GiB by itself; no memory cgroup to hold it to them: {group}")
    assert peak / 2 < group.peak() <= memory_gb * 2**30  # it did run there
