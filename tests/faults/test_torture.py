"""The short form of the crash campaign: a run struck twice in training must leave every number at nought."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from tests.faults.attacks import HOW, PLACES, draw


@pytest.mark.timeout(900)  # seconds where the machine is idle, minutes where it is not
def test_a_short_campaign_loses_nothing() -> None:
    command = [sys.executable, "-m", "tests.faults.torture", "--training-only", "--runs", "1", "--seed", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures["runs"] == 1
    assert figures["kills"] == 2
    assert figures["kills_by_how"] == {"kill_launcher": 1, "kill_one": 1}
    assert figures["samples_lost"] == figures["samples_repeated"] == figures["checkpoints_unreadable"] == 0
    assert figures["other_parameters"] == figures["unfinished"] == figures["processes_left"] == figures["hung"] == 0
    assert figures["problems"] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_exports_and_promotions_are_struck_too() -> None:
    command = [sys.executable, "-m", "tests.faults.torture", "--runs", "4", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    places = json.loads(done.stdout.splitlines()[-1])["figures"]["kills_by_place"]
    assert {"export", "promotion"} & set(places)


def test_a_seed_says_who_is_struck_where_and_how() -> None:
    first = [draw(random.Random(5), 2, 10.0) for _ in range(3)]
    assert first == [draw(random.Random(5), 2, 10.0) for _ in range(3)]
    rng = random.Random(0)
    many = [draw(rng, 2, 10.0) for _ in range(500)]
    assert {b.how for b in many} == set(HOW)
    assert {b.where for b in many} == set(PLACES)
    assert {b.victim for b in many} == {0, 1}
    assert max(b.delay_s for b in many if b.where != "anywhere") < 0.011
