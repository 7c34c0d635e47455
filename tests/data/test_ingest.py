"""Requests, histories and ids from flat logs: hand-computed on tiny ones."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from pipeline.data.ingest import ingest, shipped_specs
from pipeline.data.ingest.source import stable_hash
from pipeline.errors import DataError
from tests.data.ingest_logs import DAY, ITEMS, MINUTE, raw_ids, rows, run, spec_with, write

T = 10_000 * DAY
LOG = pl.DataFrame(
    {
        "user": [1, 1, 1, 1, 2, 1],
        "item": ["a", "b", "c", "a", "b", "e"],
        "time": [T, T + MINUTE, T + MINUTE, T + 3 * MINUTE, T + 3 * MINUTE, T + DAY],
        "tab": ["h", "z", "s", "h", "s", "h"],
        "click": [1, 0, 0, None, 1, 1],
        "long": [0, 0, 1, None, 1, 0],
    }
)


def test_one_request_an_impression_with_its_history(tmp_path: Path) -> None:
    dataset = run(tmp_path, spec_with(), LOG)
    item, author = raw_ids(dataset, "item"), raw_ids(dataset, "author")
    found = rows(dataset)
    # The impression on tab z is no candidate, but it is in the history, with surface 0 (another one).
    assert [(r["surface"], r["user_id"], r["timestamp_ms"] - T) for r in found] == [
        ("hf", 1, 0),
        ("sr", 1, MINUTE),
        ("hf", 1, 3 * MINUTE),
        ("sr", 2, 3 * MINUTE),
        ("hf", 1, DAY),
    ]
    assert [r["history_item"] for r in found] == [
        [],
        [item["a"]],  # not b, which came in the same millisecond
        [item["a"], item["c"], item["b"]],  # of equal time: in order of raw surface
        [],
        [item["c"], item["b"], item["a"]],  # the newest three
    ]
    assert found[2]["history_author"] == [author["x"], author["y"], author["x"]]
    assert found[2]["history_action"] == [1 + 1, 1 + 2, 1]  # click; long; neither
    assert found[2]["history_surface"] == [1, 2, 0]
    assert found[4]["history_action"] == [3, 1, 0]  # the last had no outcome observed
    assert found[4]["history_time_ms"] == [T + MINUTE, T + MINUTE, T + 3 * MINUTE]
    assert [r["click"] for r in found] == [[1.0], [0.0], [None], [1.0], [1.0]]
    assert [r["date"] for r in found] == ["1997-05-19"] * 4 + ["1997-05-20"]
    assert all(r["request_id"] > 0 for r in found)


def test_ids_are_ordered_by_first_day_then_key_and_absent_values_keep_their_meaning(tmp_path: Path) -> None:
    dataset = run(tmp_path, spec_with(), LOG)
    assert raw_ids(dataset, "item") == {"a": 1, "b": 2, "c": 3, "e": 4}  # e was seen a day later
    assert raw_ids(dataset, "tag") == {"1": 1, "2": 2, "3": 3}
    found = rows(dataset)
    assert [r["tag"] for r in found] == [[[1, 2]], [[]], [[1, 2]], [[2]], [[]]]
    # Item e has no row in the side table. Author shares its vocabulary with the history: unknown, not absent.
    assert found[4]["author"] == [0]
    assert dataset.schema.vocabulary("item").size == 5


def test_a_delay_keeps_younger_events_out_of_the_history(tmp_path: Path) -> None:
    found = rows(run(tmp_path, spec_with(label_delay_s=120), LOG))
    # At 3 min what is before 1 min is known: the event at 0, not those at exactly 1 min.
    assert [len(r["history_item"]) for r in found] == [0, 0, 1, 0, 3]


def test_the_order_of_input_rows_does_not_matter(tmp_path: Path) -> None:
    first = rows(run(tmp_path / "a", spec_with(), LOG))
    assert rows(run(tmp_path / "b", spec_with(), LOG.reverse())) == first


def test_requests_by_gap_break_at_pauses_surfaces_and_midnight(tmp_path: Path) -> None:
    end = T + DAY
    log = pl.DataFrame(
        {
            "user": [1, 1, 1, 1, 1],
            "item": ["a", "b", "c", "d", "a"],
            "time": [end - 40_000, end - 30_000, end - 30_000, end - 15_000, end + 1000],
            "tab": ["h", "h", "s", "h", "h"],
            "click": [1, 0, 1, 0, 1],
            "long": [0, 0, 0, 0, 0],
        }
    )
    found = rows(run(tmp_path, spec_with(request={"gap_s": 15}), log))
    assert [(r["surface"], r["click"]) for r in found] == [
        ("hf", [1.0, 0.0, 0.0]),
        ("sr", [1.0]),
        ("hf", [1.0]),
    ]
    assert found[0]["timestamp_ms"] == end - 40_000
    assert found[0]["history_item"] == []  # its own impressions are not its past
    assert len(found[1]["history_item"]) == 1  # the one at the same time is not, the one 10 s before is
    assert len(rows(run(tmp_path / "b", spec_with(request={"gap_s": 14.9}), log))) == 4


def test_given_request_ids_and_positions(tmp_path: Path) -> None:
    log = LOG.head(4).with_columns(
        request=pl.Series([7, 9, 8, 7]), place=pl.Series([1, 0, 0, 0]), tab=pl.lit("h"), time=pl.lit(T)
    )
    found = rows(run(tmp_path, spec_with(request={"id": "request", "position": "place"}), log))
    assert {r["request_id"]: r["item"] for r in found} == {7: [1, 1], 8: [3], 9: [2]}
    assert next(r for r in found if r["request_id"] == 7)["click"] == [None, 1.0]


def test_a_request_id_of_two_users_is_refused(tmp_path: Path) -> None:
    log = LOG.filter(pl.col("tab") == "s").with_columns(request=pl.lit("q"))
    with pytest.raises(DataError, match="belongs to several users"):
        run(tmp_path, spec_with(request={"id": "request"}), log)


def test_a_request_id_on_two_days_is_refused(tmp_path: Path) -> None:
    log = LOG.filter(pl.col("user") == 1).with_columns(request=pl.lit("q"), tab=pl.lit("h"))
    with pytest.raises(DataError, match=r"request \d+ of user 1 has impressions on two days; .*\(column request\)"):
        run(tmp_path, spec_with(request={"id": "request"}), log)


def test_a_candidate_without_request_id_is_refused_others_are_not(tmp_path: Path) -> None:
    log = LOG.head(3).with_columns(request=pl.Series(["p", None, "q"]))  # the second is on a tab that is not mapped
    assert len(rows(run(tmp_path, spec_with(request={"id": "request"}), log))) == 2
    with pytest.raises(DataError, match=r"impression of user 1 .* has no request id"):
        run(tmp_path / "b", spec_with(request={"id": "request"}), log.with_columns(tab=pl.lit("h")))


def test_numbers_buckets_ages_hashes_and_given_ids(tmp_path: Path) -> None:
    features = [
        *spec_with()["features"],
        {"name": "price", "level": "candidate", "column": "price", "numeric": True, "log1p": True},
        {"name": "price_bucket", "level": "candidate", "column": "price", "buckets": [1, 10]},
        {"name": "hour", "level": "request", "column": "time // 3600000 % 24", "vocabulary": "hour"},
        {"name": "place", "level": "request", "column": "place", "vocabulary": "place", "surfaces": ["hf"]},
        {"name": "age", "level": "candidate", "column": "born", "numeric": True, "age": {"format": "%Y-%m-%d"}},
    ]
    more = {"hour": {"method": "given", "size": 24}, "place": {"method": "hash", "size": 1000}}
    log = LOG.head(1).with_columns(price=pl.lit(9.0), place=pl.lit("Oslo"), born=pl.lit("1997-05-17"))
    log = pl.concat(
        [log, log.with_columns(price=None, place=None, born=None, time=pl.col("time") + MINUTE, tab=pl.lit("s"))]
    )
    spec = spec_with(features=features, vocabularies={**spec_with()["vocabularies"], **more})
    dataset = run(tmp_path, spec, log)
    first, second = rows(dataset)
    assert first["price"][0] == pytest.approx(2.302585)
    assert (first["price_bucket"], second["price_bucket"]) == ([2], [None])
    assert (second["price"], second["age"]) == ([None], [None])
    assert first["hour"] == 0
    assert first["age"] == [2.0]
    assert first["place"] == 1 + stable_hash(pl.Series(["Oslo"]))[0] % 999
    assert "place" not in second
    assert dataset.description.provenance["hash_collisions"]["place"]["colliding_share"] == 0.0
    assert dataset.schema.vocabulary("price_bucket").size == 4


def test_indexed_vocabularies_of_a_stated_size_make_later_keys_unknown(tmp_path: Path) -> None:
    vocabularies = {**spec_with()["vocabularies"], "item": {"method": "index", "size": 3}}
    found = rows(run(tmp_path, spec_with(vocabularies=vocabularies), LOG))
    assert [r["item"] for r in found] == [[1], [0], [1], [2], [0]]


def test_days_filter_and_warm_up(tmp_path: Path) -> None:
    days = {"timezone": "UTC", "first": "1997-05-19", "last": "1997-05-20", "candidates_from": "1997-05-20"}
    found = rows(run(tmp_path, spec_with(days=days), pl.concat([LOG, LOG.with_columns(pl.col("time") + 5 * DAY)])))
    assert [(r["date"], len(r["history_item"])) for r in found] == [("1997-05-20", 3)]


def test_days_are_local(tmp_path: Path) -> None:
    found = rows(run(tmp_path, spec_with(days={"timezone": "Asia/Shanghai"}), LOG.with_columns(pl.col("time") - 1)))
    assert [r["date"] for r in found] == ["1997-05-19"] * 4 + ["1997-05-20"]
    found = rows(run(tmp_path / "b", spec_with(days={"timezone": "America/New_York"}), LOG))
    assert [r["date"] for r in found] == ["1997-05-18"] * 4 + ["1997-05-19"]


def test_earlier_events_take_the_newest_ones_time_and_no_outcome(tmp_path: Path) -> None:
    earlier = {"files": ["${root}/before.parquet"], "user": "user", "items": "items", "last_time": "last"}
    history = {**spec_with()["history"], "earlier": earlier}
    tmp_path.mkdir(exist_ok=True)
    before = {"user": [1, 2, 3], "items": [["d", "a", "b", "c"], ["f"], ["g"]], "last": [T - 5, T + DAY, T]}
    pl.DataFrame(before).write_parquet(tmp_path / "before.parquet")
    dataset = run(tmp_path, spec_with(history=history), LOG)
    item = raw_ids(dataset, "item")
    found = rows(dataset)
    assert found[0]["history_item"] == [item["a"], item["b"], item["c"]]
    assert found[0]["history_time_ms"] == [T - 5] * 3
    assert (found[0]["history_action"], found[0]["history_surface"]) == ([0] * 3, [0] * 3)
    assert found[3]["history_item"] == []  # user 2's may have happened after the request
    assert "f" in item
    assert "g" not in item  # user 3 never asked for anything

    del earlier["last_time"]
    found = rows(run(tmp_path, spec_with(history=history, label_delay_s=10), LOG, "untimed"))
    assert found[0]["history_time_ms"] == [T - 10_001] * 3
    assert found[3]["history_time_ms"] == [T + 3 * MINUTE - 10_001]


def test_buckets_do_not_change_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rows(run(tmp_path, spec_with(), LOG))
    monkeypatch.setattr("pipeline.data.ingest.run.bucket_count", lambda *_: 5)
    monkeypatch.setattr("pipeline.data.ingest.run.file_requests", lambda _: 1)
    cut = run(tmp_path, spec_with(), LOG, "cut")
    assert rows(cut) == whole
    assert [len(p.files) for p in cut.description.partitions] == [2, 1, 2]


def test_mind_lines(tmp_path: Path) -> None:
    lines = [
        "1\tU1\t11/11/2019 9:05:58 AM\tN9 N8\tN1-0 N2-1",
        "2\tU2\t11/11/2019 9:30:00 AM\t\tN2-0",
        "3\tU1\t11/11/2019 10:00:00 AM\tN9 N8\tN3-1 N1-0 N4-0",
        "4\tU1\t11/12/2019 12:10:00 PM\tN9 N8\tN5 N1",
    ]
    news = [f'N{i}\tsports\tgolf\tTitle {i}\tAb "stract\turl\t[]\t[]' for i in range(1, 6)]
    (tmp_path / "behaviors.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "news.tsv").write_text("\n".join(news) + "\n")
    dataset = ingest("mind", tmp_path / "out", {"root": str(tmp_path)})
    found = rows(dataset)
    n = raw_ids(dataset, "news")
    assert [r["request_id"] for r in found] == [1, 2, 3, 4]
    assert [r["click"] for r in found] == [[0, 1], [0], [1, 0, 0], [None, None]]
    assert [r["news"] for r in found] == [
        [n["N1"], n["N2"]],
        [n["N2"]],
        [n["N3"], n["N1"], n["N4"]],
        [n["N5"], n["N1"]],
    ]
    assert [r["history_item"] for r in found] == [
        [n["N9"], n["N8"]],
        [],
        [n["N9"], n["N8"], n["N2"]],
        [n["N9"], n["N8"], n["N2"], n["N3"]],
    ]
    assert found[3]["history_action"] == [0, 0, 2, 2]
    assert found[0]["category"] == [1, 1]
    assert found[0]["history_category"] == [0, 0]  # N9 and N8 are not in news.tsv
    assert found[2]["news_all_count"] == pytest.approx([0.0, 0.6931472, 0.0])  # N1 was shown once before


def test_all_shipped_specs_are_packaged() -> None:
    assert shipped_specs() == ("kuairand", "mind")


def test_several_files_and_formats_are_one_log(tmp_path: Path) -> None:
    spec = spec_with(log={"files": ["${root}/log*"]})
    path = write(tmp_path, spec, LOG.head(3), ITEMS)
    LOG.tail(3).write_parquet(tmp_path / "log-2.parquet")
    split = rows(ingest(path, tmp_path / "out", {"root": str(tmp_path)}))
    assert split == rows(run(tmp_path / "whole", spec_with(), LOG))
