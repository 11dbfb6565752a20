"""Models that take 4 numbers of a region's position, as some released ones do, from the first step to the export."""

import json
from pathlib import Path

import pytest
import torch
from running import rows
from small_shards import P, make_samples, write_folder
from support import error_line, run_here, train

import oscar_train.checkpoints.command
import oscar_train.evaluation.command

TINY = ("--batch-size", "8", "--device", "cpu", "--region-init", "tags")


def checkpoints(*arguments: object) -> str:
    done = run_here(oscar_train.checkpoints.command.command, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("position") / "shards", make_samples(20))


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with 4 numbers, stopped and resumed after two."""
    out = tmp_path_factory.mktemp("four") / "run"
    line = ("--shards", shards, "--out", out, *TINY, "--region-position", "4", "--checkpoint-every", "2", "--keep", "2")
    assert train(*line, "--steps", "4").returncode == 0
    return out


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    out = run.parent / "exported"
    checkpoints("export", run, "--format", "oscar", "--out", out)
    return out


@pytest.mark.slow
def test_a_run_is_resumed_to_the_same_losses(run: Path, shards: Path, tmp_path: Path):
    config = json.loads((run / "checkpoint-000004" / "config.json").read_text())
    assert (config["img_feature_dim"], config["region_position"]) == (P + 4, 4)
    before = rows(run)
    for path in (run / "checkpoint-000004").iterdir():
        path.write_bytes(b"")  # the newest is damaged
    done = train("--resume", run)
    assert done.returncode == 0, done.stderr
    assert rows(run) == before


def test_the_export_has_the_width_of_the_released_ones_and_comes_back(exported: Path, shards: Path, tmp_path: Path):
    state = torch.load(exported / "pytorch_model.bin", weights_only=True)
    assert state["bert.img_embedding.weight"].shape[1] == P + 4
    assert f"features    {P} and 4 of the box" in checkpoints("show", exported)

    config = json.loads((exported / "config.json").read_text())
    assert config["img_feature_dim"] == P + 4
    assert "region_position" not in config  # a released one does not say it

    out = tmp_path / "run"
    done = train("--shards", shards, "--out", out, *TINY, "--init", exported, "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert "random: none" in done.stdout
    again = torch.load(exported / "pytorch_model.bin", weights_only=True)["bert.img_embedding.weight"]
    assert torch.equal(again, state["bert.img_embedding.weight"])
    assert json.loads((out / "checkpoint-000001" / "config.json").read_text())["img_feature_dim"] == P + 4


def test_it_is_evaluated(exported: Path, shards: Path):
    done = run_here(oscar_train.evaluation.command.command, exported, "--shards", shards, "--all", "--device", "cpu")
    assert done.returncode == 0, done.stderr


def test_another_number_than_the_checkpoints_is_refused(exported: Path, run: Path, shards: Path, tmp_path: Path):
    line = ("--shards", shards, "--out", tmp_path / "run", *TINY, "--steps", "1")
    done = train(*line, "--init", exported, "--region-position", "6")
    assert done.returncode == 2
    assert "--region-position 6: " in error_line(done)
    assert "takes 4 numbers" in error_line(done)

    done = train("--resume", run, "--region-position", "6")
    assert done.returncode == 2
    assert "region" in error_line(done)

    done = train(*line, "--region-position", "5")
    assert done.returncode == 2
    assert "known: 4, 6" in error_line(done)
