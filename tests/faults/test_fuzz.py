"""What fuzzing once found stays found: the corpus is replayed, and a few hundred fresh cases are tried."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.faults.fuzz import CORPUS, campaign, corpus_of, defect
from tests.faults.targets import Target, make_targets

# Those that are quick; the campaign takes all.
QUICK = (
    "dataset_json",
    "log_file",
    "recipe_json",
    "sweep_space",
    "rollout_plan",
    "artifact_manifest",
    "checkpoint_index",
    "checkpoint_state",
    "checkpoint_manifest",
    "unsharded_checkpoint",
    "journal_lines",
    "sent_state",
    "registry_record",
    "delta",
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("targets"), QUICK)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.filterwarnings("ignore")
def test_fresh_cases_and_the_corpus_hold(targets: dict[str, Target], name: str) -> None:
    target = targets[name]
    for path in corpus_of(target):
        assert defect(target, path.read_bytes()) == "", path.name
    for data in target.seeds:
        target.run(data)
    # PyYAML takes its time.
    _, defects, found, _ = campaign(target, 6 if name in ("sweep_space", "rollout_plan") else 30, seed=1234)
    assert defects == 0, list(found)


def test_the_corpus_is_small_and_of_known_targets() -> None:
    names = {make.name for make in CORPUS.iterdir()} if CORPUS.exists() else set()
    assert names <= {*QUICK, "ingest_spec", "artifact_signature", "program", "scorer_rows"}
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 500_000


def test_the_fuzzer_sees_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of another kind, a hang, and a wrong row; an error of ours is none."""
    from pipeline.errors import DataError
    from tests.faults.targets import WrongRow

    def run(data: bytes) -> None:
        if data == b"ours":
            raise DataError("a")
        if data == b"wrong":
            raise WrongRow("b")
        int(data)

    target = Target(name="t", seeds=(b"1",), damage=lambda d, _: d, run=run, share=1)
    assert defect(target, b"1") == defect(target, b"ours") == ""
    assert defect(target, b"wrong").startswith("WrongRow")
    assert defect(target, b"x").startswith("ValueError")
    monkeypatch.setattr("tests.faults.fuzz.LIMIT_S", 0.05)
    assert defect(replace(target, run=spin), b"1").startswith("Hang")


def spin(data: bytes) -> None:
    while True:
        pass
