"""The bench of planning at Oscar's size, on a small share of it: what it simulates is what is planned."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench/scale.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("scale")
    line = [sys.executable, BENCH, "--scale", "0.0005", "--images-per-shard", "100", "--place", place, "--out", "out"]
    subprocess.run(line, check=True, capture_output=True, timeout=120, cwd=place)
    assert list(place.iterdir()) == [place / "out"]  # nothing stays behind
    found: dict[str, Any] = json.loads((place / "out/scale.json").read_text())
    return found


@pytest.mark.parametrize("part", ["published", "manifest"])
def test_all_that_is_simulated_is_planned_and_half_of_it_is_left(report, part):
    simulated, planned, resumed = (report[part][what] for what in ("simulated", "plan", "resume"))
    assert planned["images"] == simulated["images"] > 1000
    assert planned["texts"] == simulated["texts"] > planned["images"]
    assert planned["left_out"] == 0
    assert planned["shards"] == resumed["shards"] == -(-planned["images"] // 100)
    assert resumed["shards_left"] == -(-planned["shards"] // 2)
    assert resumed["plan_was_taken"]
    assert resumed["images_of_first_left"] == 100
    assert resumed["images_counted"] == 100 * (planned["shards"] // 2)
