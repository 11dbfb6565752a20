"""The simulation of many workers, at a small size: all is done, once, and the deaths are seen to."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench/claims.py"


def test_workers_that_die_leave_nothing_undone_and_claims_cost_less_than_a_hundredth(tmp_path: Path):
    line = [sys.executable, BENCH, "--shards", "40", "--workers", "6", "--deaths", "5", "--out", tmp_path / "out"]
    subprocess.run([*line, "--place", tmp_path], check=True, capture_output=True, timeout=120)
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]  # nothing stays behind
    report = json.loads((tmp_path / "out/claims.json").read_text())
    assert report["deaths"] > 0
    assert report["claims"] > report["shards"] == 40
    assert (report["shards_left"], report["named_twice"]) == (0, 0)
    assert report["files"] == {".tar": 40, ".parquet": 40}
    assert report["overhead"] < 0.01
