"""The report: one page that needs nothing else and says what the decisions say."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.rollout.measurements import SurfaceMeasurements, TaskMeasurements
from pipeline.rollout.report import report_html, write_report
from pipeline.rollout.results import RESULT, WAVE_RESULT, read_result
from tests.rollout.plans import plan
from tests.rollout.results import wave_result


class Page(HTMLParser):
    """Text and tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            v or "" for n, v in attrs if n in ("src", "href", "xlink:href") and not (v or "").startswith("#")
        ]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_the_page_stands_alone_and_says_what_was_decided(tmp_path: Path) -> None:
    write_report(wave_result(), plan(), tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert page.links == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 4
    assert "1 of 2 surfaces passed every gate" in page.text
    assert "trefoil rollout promote hf" in page.text
    assert "trefoil rollout promote sr" not in page.text
    assert "cost : 1.70 times the separate model's, at most 1.5" in page.text.replace("cost:", "cost :")
    assert "against champion version 1" in page.text
    assert "nothing served before" in page.text
    assert "1.70 [1.60, 1.90]" in page.text
    assert "Each is compared with its champion or, where nothing served before, the trivial baseline" in page.text
    # hf has a champion, sr has not: the baseline stands in, and no cost is drawn for it.
    assert page.words.count("trivial baseline") == 1
    assert page.words.count("champion") == 2
    # Reasons are text, never markup.
    assert "worse: <b>sr</b>" in page.text
    for fact in ("abc123", "run-1", plan().digest, plan().dataset):
        assert fact in page.text


def test_the_same_result_gives_the_same_page() -> None:
    assert report_html(wave_result(), plan()) == report_html(wave_result(), plan())


def test_gaps_are_shown_and_no_error() -> None:
    bare = {s: SurfaceMeasurements(surface=s, tasks={"click": TaskMeasurements()}) for s in wave_result().measurements}
    page = Page(report_html(wave_result(measurements=bare, wave=0, rungs=(), curves={}), plan()))
    assert "not measured" in page.text
    assert "The separate models" in page.text
    assert page.tags.count("svg") == 3


def test_a_result_is_read_back_and_held_against_its_plan(tmp_path: Path) -> None:
    assert read_result(tmp_path, plan()) is None
    (tmp_path / RESULT).write_bytes(WAVE_RESULT.dump_json(wave_result()))
    assert read_result(tmp_path, plan()) == wave_result()
    other = plan(thresholds=replace(plan().thresholds, drift=0.3))
    with pytest.raises(ConfigError, match="is of another plan"):
        read_result(tmp_path, other)
    (tmp_path / RESULT).write_text("{}")
    with pytest.raises(ConfigError, match="is damaged"):
        read_result(tmp_path, plan())
    assert wave_result().last_rung.step == "merged"
