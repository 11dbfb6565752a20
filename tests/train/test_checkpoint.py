"""Checkpoints are whole or absent, come back to the bit, and belong to one run."""

import errno
import json
import os
import shutil
from contextlib import suppress
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

from oscar_common.errors import UsageError
from oscar_common.settings import Train
from oscar_train.checkpoints import checkpoint
from oscar_train.checkpoints.checkpoint import Checkpoint
from oscar_train.checkpoints.init import build, open_init
from oscar_train.data.stream import Stream
from oscar_train.ranks import Ranks
from oscar_train.training.step import TrainState, make_train_state, share, take

RUN = {**checkpoint.identity(Train()), "corpus": "abc"}


@pytest.fixture
def made(stream: Stream, tmp_path: Path) -> Checkpoint:
    """The checkpoint of a model after one step."""
    train_state = fresh()
    take(train_state, share(train_state, stream.batch(0, stream.buffer())), 1e-3)
    guard = {"skipped": 2, "losses": [1 / 3, 2e-9]}
    return checkpoint.save(
        tmp_path, 1, RUN, train_state.model, train_state.optimizer, stream.corpus.tokenizer, ranks=3, guard=guard
    )


def fresh(seed: int = 1) -> TrainState:
    model, _ = build(open_init("random:tiny"), feature_dim=24, seed=seed)
    return make_train_state(model, Train(), Ranks(0, 1, torch.device("cpu")))


def rewrite(folder: Path, **entries: object) -> None:
    """Change a record as the first versions would have written it: without a seal of its own."""
    record = json.loads((folder / "trainer.json").read_text())
    record.pop("seal", None)
    (folder / "trainer.json").write_text(json.dumps({**record, **entries}))


def test_model_and_optimizer_come_back_to_the_bit(made: Checkpoint, stream: Stream):
    batch = stream.batch(1, stream.buffer())
    ends = []
    for seed in (8, 9):  # whatever was there before
        train_state = fresh(seed)
        checkpoint.load(made, train_state.model, train_state.optimizer)
        torch.manual_seed(seed)  # nothing is drawn from it
        take(train_state, share(train_state, batch), 1e-3)
        ends.append(train_state.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_guard_and_the_number_of_ranks_come_back(made: Checkpoint, tmp_path: Path):
    found = checkpoint.at(tmp_path, 1)
    assert found == made
    assert (found.ranks, found.guard) == (3, {"skipped": 2, "losses": [1 / 3, 2e-9]})


def test_threads_come_back_only_with_as_many_ranks(made: Checkpoint):
    rewrite(made.folder, threads=2)
    two, train_state = checkpoint.read(made.folder)[0], fresh()
    checkpoint.load(two, train_state.model, train_state.optimizer, ranks=1)
    assert torch.get_num_threads() == 1
    checkpoint.load(two, train_state.model, train_state.optimizer, ranks=3)
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


def small(place: Path, step: int, *damages: str) -> Path:
    """Write a checkpoint that is whole, but for some damages, and has no numbers in it."""
    place.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "optimizer.pt"):
        (place / name).write_bytes(f"{name} of step {step}".encode())
    record: dict[str, object] = {"step": step, "run": RUN, "ranks": 1, "threads": 1, "about": {}}
    record["guard"] = {"skipped": 0, "losses": []}
    record["files"] = {path.name: checkpoint._seal(path) for path in place.iterdir()}
    record["seal"] = checkpoint._record_seal(record)
    text = json.dumps(record)
    if "record" in damages:
        text = text.replace('"threads": 1', '"threads": 3')
    (place / "trainer.json").write_text(text)
    for name in {"model.safetensors", "optimizer.pt"} & {*damages}:
        os.truncate(place / name, 3)
    return place


def steps(out: Path) -> set[int]:
    return {int(place.name[-6:]) for place in out.iterdir()}


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("first", range(3))
def test_after_each_removal_the_newest_whole_checkpoint_is_still_there(
    tmp_path: Path, keep: int, first: int, monkeypatch: pytest.MonkeyPatch
):
    """Five checkpoints, the last one just saved, each whole or damaged in one of three ways, and a stop anywhere."""
    delete, ways = checkpoint._delete, ("model.safetensors", "record", "optimizer.pt")
    monkeypatch.setattr(checkpoint, "_delete", lambda place: (delete(place), check()))
    for number, damaged in enumerate(product((False, True), repeat=5)):
        out = tmp_path / str(number)
        for n, is_damaged in enumerate(damaged):
            step = 50 - 10 * n
            small(checkpoint.folder(out, step), step, *([ways[(first + n) % 3]] if is_damaged else []))
        whole = [50 - 10 * n for n in range(5) if not damaged[n]]

        def check(out: Path = out, whole: list[int] = whole) -> None:
            last, _ = checkpoint.newest(out)
            assert last is not None
            assert last.step == whole[0]

        checkpoint.prune(out, keep, 50)
        assert steps(out) == (set(whole[:keep]) if whole else {10, 20, 30, 40, 50}), damaged


@pytest.mark.parametrize("damaged", [list(some) for n in range(5) for some in combinations((10, 20, 30, 40), n)])
@pytest.mark.parametrize("keep", [1, 3])
def test_a_line_of_steps_that_was_given_up_goes_once_something_newer_is_whole(
    tmp_path: Path, damaged: list[int], keep: int
):
    """A run at step 30 goes on from a whole checkpoint before it, and 40 was given up."""
    for step in (10, 20, 30, 40):
        small(checkpoint.folder(tmp_path, step), step, "record" if step in damaged else "")
    whole = [step for step in (30, 20, 10) if step not in damaged]
    kept = {*whole[:keep], *([] if 30 in whole else [40])}

    checkpoint.prune(tmp_path, keep, 30)
    assert steps(tmp_path) == (kept if whole else {10, 20, 30, 40})


def test_an_error_of_the_disk_that_passes_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for step in (10, 20, 30):
        small(checkpoint.folder(tmp_path, step), step)
    seal = checkpoint._seal

    def fails(path: Path) -> dict[str, Any]:
        if "000020" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return seal(path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_seal", fails)
        checkpoint.prune(tmp_path, 2, 30)
        assert steps(tmp_path) == {10, 20, 30}
        shutil.rmtree(tmp_path / "checkpoint-000030")
        with pytest.raises(OSError, match="Input/output error"):
            checkpoint.newest(tmp_path)
    last, _ = checkpoint.newest(tmp_path)
    assert last is not None
    assert last.step == 20


def test_nothing_is_read_unless_something_is_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for step in (10, 20):
        small(checkpoint.folder(tmp_path, step), step)
    monkeypatch.setattr(checkpoint, "whole", None)
    checkpoint.prune(tmp_path, 2, 20)
    assert steps(tmp_path) == {10, 20}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"step": 20}, "trainer.json is of step 20"),
        ({"files": {}}, "trainer.json has no seal of config.json"),
        ({"stap": 10}, "the content of trainer.json changed"),
        ({"step": float("inf")}, "trainer.json is unreadable"),
        ({"files": []}, "trainer.json is unreadable"),
        ({"guard": []}, "trainer.json is unreadable"),
    ],
)
def test_a_record_that_cannot_be_right_is_damage(tmp_path: Path, entries: dict[str, object], message: str):
    rewrite(small(checkpoint.folder(tmp_path, 10), 10), **entries)
    with pytest.raises(ValueError, match=message):
        checkpoint.whole(tmp_path / "checkpoint-000010")


def test_a_seal_that_lost_an_entry_is_damage(tmp_path: Path):
    place = small(checkpoint.folder(tmp_path, 10), 10)
    files = json.loads((place / "trainer.json").read_text())["files"]
    rewrite(place, files={**files, "optimizer.pt": {"bites": 3}})
    with pytest.raises(ValueError, match=r"optimizer.pt has 23 bytes, written were unknown"):
        checkpoint.whole(place)


def test_any_bit_of_the_record_that_flips_is_noticed_or_says_the_same(tmp_path: Path):
    place = small(checkpoint.folder(tmp_path, 10), 10)
    made, content = checkpoint.whole(place), (place / "trainer.json").read_bytes()
    for number in range(len(content)):
        changed = bytearray(content)
        changed[number] ^= 1 << number % 8
        (place / "trainer.json").write_bytes(changed)
        with suppress(ValueError):
            assert checkpoint.whole(place) == made


def test_checkpoints_of_the_first_versions_stay_readable(made: Checkpoint):
    rewrite(made.folder)
    assert checkpoint.whole(made.folder) == made


def test_only_the_newest_are_kept_and_leftovers_swept(tmp_path: Path):
    """By number, not by name; and what people called alike is theirs."""
    for step in (5, 10, 999_995, 1_000_000):
        small(checkpoint.folder(tmp_path, step), step)
    (tmp_path / ".tmp-checkpoint-000015").mkdir()
    theirs = {"notes.txt", "checkpoint-000005.tar", *("checkpoint-best", "checkpoint-7", ".tmp-checkpoint-best")}
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-000005.tar").write_text("mine")
    for name in ("checkpoint-best", "checkpoint-7", ".tmp-checkpoint-best"):
        small(tmp_path / name, 5)

    checkpoint.prune(tmp_path, 2, 1_000_000)
    checkpoint.sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-999995", "checkpoint-1000000", *theirs}
    last, damages = checkpoint.newest(tmp_path)
    assert last is not None
    assert (last.step, damages) == (1_000_000, [])
    checkpoint.sweep(tmp_path, everything=True)
    assert {p.name for p in tmp_path.iterdir()} == theirs
