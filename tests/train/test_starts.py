"""starts.jsonl: with what a run was made, one line for each start."""

import hashlib
import json
import platform
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from remotes import serve
from small_shards import make_samples, write_folder

from oscar_common import __version__
from oscar_train.checkpoints import checkpoint
from oscar_train.data.sources import open_source
from oscar_train.logs.provenance import record_start

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("starts") / "shards", make_samples(12))


def test_each_start_is_a_line_that_says_when_where_and_with_what(folder: Path, tmp_path: Path):
    source = open_source(str(folder), skip_corrupt=False)
    record_start(tmp_path, step=0, device=CPU, ranks=1, shards=[source])
    record_start(tmp_path, step=500, device=CPU, ranks=2, shards=[source], eval_shards=[source])
    first, second = map(json.loads, (tmp_path / "starts.jsonl").read_text().splitlines())
    assert datetime.now(timezone.utc) - datetime.fromisoformat(first["time"]) < timedelta(minutes=1)
    assert first["device"]
    assert (first["step"], first["ranks"], first["threads"]) == (0, 1, torch.get_num_threads())
    assert first["versions"]["python"] == platform.python_version()
    assert first["versions"]["oscar-pretrain"] == __version__
    assert first["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert first["versions"].keys() == {"oscar-pretrain", "python", "torch", "transformers", "numpy"}
    described = {
        "place": str(folder),
        "manifest_sha256": hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
        "images": 12,
        "weights_sha256": "0",
    }
    assert (first["shards"], first["eval_shards"]) == ([described], [])
    assert (second["step"], second["ranks"]) == (500, 2)
    assert (second["shards"], second["eval_shards"]) == ([described], [described])


def test_shards_behind_a_url_are_described_by_it(folder: Path, tmp_path: Path):
    with serve(folder) as server:
        record_start(tmp_path, step=0, device=CPU, ranks=1, shards=[open_source(server.url, skip_corrupt=False)])
        (found,) = json.loads((tmp_path / "starts.jsonl").read_text())["shards"]
        assert found["place"] == server.url
    assert found["manifest_sha256"] == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def test_a_run_that_begins_anew_has_no_logs_of_the_last_one(tmp_path: Path):
    for name in ("metrics.csv", "evaluation.csv", "starts.jsonl", "tensorboard/events", "wandb/id", "mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    checkpoint.sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    checkpoint.sweep(tmp_path, everything=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
