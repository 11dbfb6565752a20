"""The four steps of `make demo`, with a twentieth of its training."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from running import ENVIRONMENT
from support import oscar

ROOT = Path(__file__).parents[2]


def tool(name: str) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / name, "runs/demo"], env=ENVIRONMENT, check=True)


def test_the_demo_comes_to_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pipelines.yaml").write_bytes((ROOT / "pipelines.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    tool("demo_photos.py")
    for step in (
        ("oscar-extract", "--pipeline", "demo"),
        ("oscar-train", "--pipeline", "demo", "--steps", 20, "--warmup-steps", 2, "--eval-every", 10),
    ):
        done = oscar(*step)
        assert done.returncode == 0, done.stderr
    tool("demo_report.py")
    with (tmp_path / "runs/demo/train/evaluation.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["10", "20"]
    page = (tmp_path / "runs/demo/report.html").read_text()
    assert page.count("<img") >= 13
    assert "held out" in page
