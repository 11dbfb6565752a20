"""The four steps of `make demo`, with a twentieth of its training."""

import csv
import subprocess
import sys
from pathlib import Path

from running import ENVIRONMENT

ROOT = Path(__file__).parents[2]


def test_the_demo_comes_to_its_report(tmp_path: Path):
    steps = (
        (ROOT / "tools" / "demo_photos.py", "runs/demo"),
        ("-m", "oscar_extract", "--pipeline", "demo"),
        ("-m", "oscar_train", "--pipeline", "demo", "--steps", "20", "--warmup-steps", "2", "--eval-every", "10"),
        (ROOT / "tools" / "demo_report.py", "runs/demo"),
    )
    (tmp_path / "pipelines.yaml").write_bytes((ROOT / "pipelines.yaml").read_bytes())
    for step in steps:
        done = subprocess.run([sys.executable, *step], cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    with (tmp_path / "runs/demo/train/evaluation.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["10", "20"]
    page = (tmp_path / "runs/demo/report.html").read_text()
    assert page.count("<img") >= 13
    assert "held out" in page
