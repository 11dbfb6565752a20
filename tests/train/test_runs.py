"""Short whole runs: on features stored as int8, and on texts laid over the shards."""

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from running import rows
from small_shards import make_samples, write_folder
from support import error_line, train

from oscar_common.config import load_catalog
from oscar_train.__main__ import command

SETTINGS = ("--steps", "4", "--batch-size", "4", "--checkpoint-every", "2", "--init", "random:tiny", "--device", "cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("runs") / "shards", make_samples(12), dtype="int8")


def overlay(path: Path, text: str, key: str = "image-002", replace: str = "all") -> Path:
    rows = {"key": [key, key], "text": [text, f"{text} again"]}
    pq.write_table(pa.table(rows).replace_schema_metadata({"oscar.texts.replace": replace}), path)
    return path


def test_a_run_on_int8_features_goes_on_to_the_same_numbers(shards: Path, tmp_path: Path):
    arguments = ("--shards", shards, "--out", tmp_path / "run", *SETTINGS)
    assert train(*arguments).returncode == 0
    whole, last = rows(tmp_path / "run"), tmp_path / "run" / "checkpoint-000004"
    weights = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)
    done = train(*arguments)
    assert done.returncode == 0, done.stderr
    assert "going on after step 2 of 4" in done.stdout
    assert rows(tmp_path / "run") == whole
    assert (last / "model.safetensors").read_bytes() == weights


def test_a_run_sees_the_texts_laid_over_and_is_not_continued_with_others(shards: Path, tmp_path: Path):
    first, other = overlay(tmp_path / "a.parquet", "a cat sleeps"), overlay(tmp_path / "b.parquet", "a dog barks")
    arguments = ("--shards", shards, "--out", tmp_path / "run", *SETTINGS)
    done = train(*arguments, "--texts", first)
    assert done.returncode == 0, done.stderr
    assert "2 triples of 1 image; left out: 11 images without text" in done.stdout
    moved = first.rename(tmp_path / "moved.parquet")
    assert "complete: all 4 steps are done" in train(*arguments, "--texts", moved).stdout
    for texts in ((), ("--texts", other), ("--texts", moved, "--texts", other)):
        done = train(*arguments, *texts)
        assert done.returncode == 2
        assert "--shards and --texts: their content is not what the run in --out began with" in error_line(done)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("none.parquet", "none.parquet: no such file; give one that oscar-shards texts wrote"),
        ("other.parquet", "other.parquet: none of its 2 texts has the key of an image"),
        ("damaged.parquet", "damaged.parquet: cannot be read as .parquet"),
        ("columns.parquet", "columns.parquet: it has the columns image, text; needed are key"),
    ],
)
def test_texts_that_are_none_are_one_line_and_exit_2(shards: Path, tmp_path: Path, file: str, message: str):
    overlay(tmp_path / "other.parquet", "no", key="of-other-shards")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more PAR1")
    pq.write_table(pa.table({"image": ["image-002"], "text": ["a"]}), tmp_path / "columns.parquet")
    done = train("--shards", shards, "--out", tmp_path / "run", *SETTINGS, "--texts", tmp_path / file)
    assert done.returncode == 2
    assert message in error_line(done)
    assert not (tmp_path / "run").exists()


def test_missing_texts_are_noticed_before_torch_is_imported(shards: Path, tmp_path: Path):
    code = "import sys; from oscar_train.__main__ import command; from oscar_common.cli import run\n" \
        "try: run(command, sys.argv[1:])\nfinally: print('torch' in sys.modules)"  # fmt: skip
    flags = ("--shards", shards, "--out", tmp_path / "run", "--texts", tmp_path / "none.parquet")
    done = subprocess.run([sys.executable, "-c", code, *map(str, flags)], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr


def test_texts_may_stand_in_pipelines_yaml(tmp_path: Path):
    (tmp_path / "p.yaml").write_text("pipelines:\n  mine:\n    train: {texts: [a.parquet, b.parquet]}\n")
    assert load_catalog(tmp_path / "p.yaml").pipelines["mine"].train["texts"] == ["a.parquet", "b.parquet"]
    assert any(option.name == "texts" and option.multiple for option in command.params)


@pytest.fixture(scope="module")
def plain_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("plain") / "shards", make_samples(30)[12:], per_shard=6)


def test_a_mix_of_folders_is_a_run_of_its_own(shards: Path, plain_shards: Path, tmp_path: Path):
    both = ("--shards", shards, "--shards", plain_shards, "--out", tmp_path / "run", *SETTINGS)
    done = train(*both, "--mix", "2", "--mix", "0.5")
    assert done.returncode == 0, done.stderr
    assert "95 triples of 29 images; left out: 1 image without text" in done.stdout
    assert "complete: all 4 steps" in train(*both, "--mix", "2", "--mix", "0.5", "--read-threads", "3").stdout
    for flags, message in (
        (("--mix", "2", "--mix", "1"), "--mix 2.0 1.0: the run in --out began with 2.0 0.5"),
        ((), "--mix : the run in --out began with 2.0 0.5"),
        (("--mix", "2", "--mix", ".5", "--shuffle-window", "2"), "--shuffle-window 2: the run in --out began with 64"),
    ):
        assert message in error_line(train(*both, *flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mix", "1", "--mix", "2"), "error: --mix: 2 weights for 1 --shards; give one for each"),
        (("--mix", "0"), "error: --mix: 0.0 is out of range; it must be between 0.001 and 1000"),
        (("--mix", "nan"), "error: --mix: nan is out of range; it must be between 0.001 and 1000"),
        (("--shuffle-window", "0"), "error: --shuffle-window: 0 is out of range; it must be at least 1"),
        (("--cache-size", "-1"), "error: --cache-size: -1.0 is out of range; it must be at least 0"),
    ],
)
def test_a_mix_that_makes_no_sense_is_one_line(shards: Path, tmp_path: Path, flags: tuple[str, ...], message: str):
    done = train("--shards", shards, "--out", tmp_path / "run", *SETTINGS, *flags)
    assert done.returncode == 2
    assert error_line(done) == message


def test_a_damaged_image_ends_a_run_by_name_or_is_skipped_and_counted(plain_shards: Path, tmp_path: Path):
    copy = Path(shutil.copytree(plain_shards, tmp_path / "shards"))
    row = pq.read_table(copy / "shard-000001.parquet").to_pylist()[2]
    with (copy / "shard-000001.tar").open("r+b") as tar:
        tar.seek(row["features_offset"])
        tar.write(b"\x01\x02\x03")
    arguments = ("--shards", copy, "--out", tmp_path / "run", *SETTINGS, "--batch-size", "50")
    done = train(*arguments)
    assert done.returncode == 1
    assert f"shard-000001.tar: image {row['key']}: its features are not those that were written" in error_line(done)
    done = train(*arguments, "--skip-corrupt")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"warning: skipped: {copy}/shard-000001.tar: image {row['key']}") == 1
    header, *rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    skipped = [int(cells[header.index("skipped")]) for cells in rows]
    triples = len(row["texts"])
    assert sum(skipped) in range(triples * 3, triples * 4 + 1)  # 200 places: three epochs and a half of 57 triples


def test_a_cache_that_cannot_be_written_is_one_line(shards: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = train("--shards", shards, "--out", tmp_path / "run", *SETTINGS, "--cache", tmp_path / "file")
    assert done.returncode == 2
    assert error_line(done) == (
        f"error: --cache {tmp_path}/file/corpus: cannot be written: Not a directory; give another --cache"
    )
