"""Checkpoints are whole or absent, come back to the bit, and belong to one run."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch

from oscar_common.errors import UsageError
from oscar_common.settings import Train
from oscar_train import checkpoint
from oscar_train.checkpoint import Checkpoint
from oscar_train.ranks import Ranks
from oscar_train.step import Workshop, open_workshop, share, take
from oscar_train.stream import Stream
from oscar_train.weights import build, open_init

RUN = {**checkpoint.identity(Train()), "corpus": "abc"}


@pytest.fixture
def made(stream: Stream, tmp_path: Path) -> Checkpoint:
    """The checkpoint of a model after one step."""
    shop = fresh()
    take(shop, share(shop, stream.batch(0, stream.room())), 1e-3)
    guard = {"skipped": 2, "losses": [1 / 3, 2e-9]}
    return checkpoint.save(tmp_path, 1, RUN, shop.model, shop.optimizer, stream.corpus.tokenizer, ranks=3, guard=guard)


def fresh(seed: int = 1) -> Workshop:
    model, _ = build(open_init("random:tiny"), feature_dim=24, seed=seed)
    return open_workshop(model, Train(), Ranks(0, 1, torch.device("cpu")))


def test_model_and_optimizer_come_back_to_the_bit(made: Checkpoint, stream: Stream):
    batch = stream.batch(1, stream.room())
    ends = []
    for seed in (8, 9):  # whatever was there before
        shop = fresh(seed)
        checkpoint.load(made, shop.model, shop.optimizer)
        torch.manual_seed(seed)  # nothing is drawn from it
        take(shop, share(shop, batch), 1e-3)
        ends.append(shop.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_guard_and_the_number_of_ranks_come_back(made: Checkpoint, tmp_path: Path):
    found = checkpoint.at(tmp_path, 1)
    assert found == made
    assert (found.ranks, found.guard) == (3, {"skipped": 2, "losses": [1 / 3, 2e-9]})


def test_threads_come_back_only_with_as_many_ranks(made: Checkpoint):
    record = json.loads((made.folder / "trainer.json").read_text())
    (made.folder / "trainer.json").write_text(json.dumps({**record, "threads": 2}))
    two, shop = checkpoint.read(made.folder)[0], fresh()
    checkpoint.load(two, shop.model, shop.optimizer, ranks=1)
    assert torch.get_num_threads() == 1
    checkpoint.load(two, shop.model, shop.optimizer, ranks=3)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_the_folder_is_one_that_bert_users_know(made: Checkpoint):
    names = {p.name for p in made.folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "optimizer.pt", "trainer.json"}
    config = json.loads((made.folder / "config.json").read_text())
    assert config["img_feature_dim"] == 30
    assert config["num_contrast_classes"] == 2
    _, line = build(open_init(str(made.folder)), feature_dim=24, seed=3)
    assert line.endswith("random: none")


def test_the_newest_whole_one_is_found(made: Checkpoint, tmp_path: Path):
    assert checkpoint.newest(tmp_path) == (made, [])
    later = shutil.copytree(made.folder, tmp_path / "checkpoint-000002")
    with (later / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    found, damages = checkpoint.newest(tmp_path)
    assert found == made
    assert len(damages) == 1
    assert "checkpoint-000002 is damaged (model.safetensors has 1000 bytes, written were" in damages[0]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer.json", "vocab.txt"])
def test_a_changed_or_missing_file_is_noticed(made: Checkpoint, tmp_path: Path, name: str):
    content = bytearray((made.folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (made.folder / name).write_bytes(content if name != "trainer.json" else content[:-9])
    with pytest.raises(UsageError, match=f"checkpoint-000001 is damaged .*{name}.*--overwrite"):
        checkpoint.newest(tmp_path)
    (made.folder / name).unlink()
    with pytest.raises(UsageError, match=f"{name} is missing"):
        checkpoint.newest(tmp_path)


def test_another_runs_checkpoint_is_refused_with_both_values(made: Checkpoint):
    checkpoint.agree(made, RUN)
    checkpoint.agree(None, RUN)
    with pytest.raises(UsageError, match=r"--batch-size 8: the run in --out began with 64; .*--overwrite.*at step 1"):
        checkpoint.agree(made, {**RUN, "batch_size": 8})
    with pytest.raises(UsageError, match=r"--shards and --texts: .*abc, now xyz"):
        checkpoint.agree(made, {**RUN, "corpus": "xyz"})


def copies(made: Checkpoint, steps: list[int]) -> list[Path]:
    """Copy a checkpoint to other steps' places, without its large files."""
    (made.folder / "model.safetensors").write_bytes(b"weights")
    (made.folder / "optimizer.pt").write_bytes(b"moments")
    record = json.loads((made.folder / "trainer.json").read_text())
    for name in ("model.safetensors", "optimizer.pt"):
        record["files"][name] = checkpoint._seal(made.folder / name)
    (made.folder / "trainer.json").write_text(json.dumps(record))
    return [shutil.copytree(made.folder, made.folder.parent / f"checkpoint-{step:06d}") for step in steps]


@pytest.mark.parametrize("damaged", [list(some) for n in range(5) for some in combinations((10, 20, 30, 40), n)])
@pytest.mark.parametrize("keep", [1, 3])
def test_damaged_checkpoints_never_count_as_kept(made: Checkpoint, damaged: list[int], keep: int):
    """A run at step 30 goes on from a whole checkpoint before it, and 40 was given up."""
    out = made.folder.parent
    copies(made, [10, 20, 30, 40])
    shutil.rmtree(made.folder)
    for step in damaged:
        content = (out / f"checkpoint-{step:06d}" / "model.safetensors").read_bytes()
        (out / f"checkpoint-{step:06d}" / "model.safetensors").write_bytes(content[:-1] + b"?")
    whole = [step for step in (30, 20, 10) if step not in damaged]

    checkpoint.prune(out, keep, 30)
    left = {int(place.name[-6:]) for place in out.iterdir()}
    assert left == (set(whole[:keep]) if whole else {10, 20, 30, 40})


def test_only_the_newest_are_kept_and_leftovers_swept(made: Checkpoint, tmp_path: Path):
    copies(made, [5, 10, 999_995, 1_000_000])
    (tmp_path / ".tmp-checkpoint-000015").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.prune(tmp_path, 2, 1_000_000)
    checkpoint.sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-999995", "checkpoint-1000000", "notes.txt"}
    checkpoint.sweep(tmp_path, everything=True)
    assert {p.name for p in tmp_path.iterdir()} == {"notes.txt"}
