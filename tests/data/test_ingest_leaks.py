"""Leaks of each kind, planted: those that a spec shows are refused, those of the code are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.data.ingest import find_leaks, load_spec, refuse_leaks
from pipeline.data.ingest.history import HistoryBuilder
from pipeline.data.ingest.rates import RateTable
from pipeline.errors import ConfigError, DataError
from tests.data.ingest_logs import CAUSAL, DAY, MINUTE, SPEC, random_log, spec_with, write

AT = 10_001 * DAY + 15 * MINUTE
DELAY_S = 600.0


def reading(column: str, **changes: Any) -> dict[str, Any]:
    """The tiny spec with a feature that reads `column` of the log."""
    feature = {"name": "watched", "level": "candidate", "column": column, "numeric": True}
    return spec_with(**{"features": [*SPEC["features"], feature], **changes})


LEAKS: dict[str, dict[str, Any]] = {
    "the label itself": reading("click"),
    "what a label is made from": reading("played / length", tasks={"long": "played > 18"}),
    "by way of a derived column": reading(
        "share", log={"files": ["${root}/log.csv"], "derive": {"seconds": "played // 1000", "share": "seconds / 60"}}
    )
    | {"tasks": {"long": "played > 18000"}},
    "a label derived from it": reading("played", log={"files": ["${root}/log.csv"], "derive": {"seen": "played > 18"}})
    | {"tasks": {"seen": "seen"}},
}


@pytest.mark.parametrize("spec", LEAKS.values(), ids=list(LEAKS))
def test_a_feature_made_from_an_outcome_is_refused(tmp_path: Path, spec: dict[str, Any]) -> None:
    path = write(tmp_path, spec, random_log(0, 5))
    with pytest.raises(ConfigError, match=r"features\.3 \(watched\): reads '.*', which task '.*' is made from"):
        load_spec(path, {"root": str(tmp_path)})


def test_so_is_a_key_of_a_side_table(tmp_path: Path) -> None:
    tables = {"items": {**SPEC["tables"]["items"], "log_key": "CASE WHEN click = 1 THEN item END"}}
    path = write(tmp_path, spec_with(tables=tables), random_log(0, 5))
    with pytest.raises(ConfigError, match=r"tables\.items\.log_key: reads 'click'"):
        load_spec(path, {"root": str(tmp_path)})


def test_what_is_known_at_the_request_is_said_by_name(tmp_path: Path) -> None:
    tasks = {"long": "played > 0.5 * length"}
    params = {"root": str(tmp_path)}
    log = random_log(0, 5)
    load_spec(write(tmp_path, reading("length", tasks=tasks, known_at_request=["length"]), log), params)
    for known, message in (
        ([], r"\(watched\): reads 'length'"),
        (["lenth"], r"known_at_request: unknown column that a feature or key reads 'lenth'; did you mean 'length'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_spec(write(tmp_path, reading("length", tasks=tasks, known_at_request=known), log), params)


def leaks(root: Path) -> dict[str, int]:
    spec = spec_with(causal=CAUSAL, label_delay_s=DELAY_S)
    return find_leaks(write(root, spec, random_log(3, 400)), {"root": str(root)}, at=AT)


def test_no_column_sees_outcomes_that_are_not_known(tmp_path: Path) -> None:
    assert leaks(tmp_path) == {}
    with pytest.raises(ConfigError, match="no request lies at or before 1 ms"):
        find_leaks(tmp_path / "spec.yaml", {"root": str(tmp_path)}, at=1)


def test_rates_within_the_delay_are_found_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = RateTable.__init__

    def hasty(self: RateTable, *arguments: Any, **more: Any) -> None:
        genuine(self, *arguments, **more)
        self._delay = round((DELAY_S - 300) * 1000)

    monkeypatch.setattr(RateTable, "__init__", hasty)
    found = leaks(tmp_path)
    assert {"u_rate_click", "u_ewma_long", "u_last_click", "i_rate_click", "ut_rate_long"} <= found.keys()
    path, params = tmp_path / "spec.yaml", {"root": str(tmp_path)}
    with pytest.raises(DataError, match=r"columns know outcomes that are not known .*u_"):
        refuse_leaks(path, params, at=AT)
    arguments = [str(path), "--out", str(tmp_path / "out"), f"root={tmp_path}", "--check-leaks-at-ms", str(AT)]
    assert main(["ingest", *arguments]) == 1
    assert not (tmp_path / "out").exists()
    # What counts events or their times holds no outcome.
    assert not [name for name in found if "count" in name or "recency" in name or name.startswith("session")]


def test_histories_within_the_delay_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = HistoryBuilder.__init__

    def hasty(self: HistoryBuilder, *arguments: Any, **more: Any) -> None:
        genuine(self, *arguments, **more)
        self._delay = -1  # events of the request's own time too

    monkeypatch.setattr(HistoryBuilder, "__init__", hasty)
    monkeypatch.setattr("pipeline.data.check._history_time_faults", lambda *_: iter(()))  # which refuses them before
    assert leaks(tmp_path).keys() == {"history_action"}
