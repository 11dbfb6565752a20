"""Whatever goes wrong in one process: nothing is lost, nothing is written twice, and the exit code and summary tell."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import contents, error_line, extract, oscar, photo, rejects, slow_jpeg, start, until

from oscar_shards.read import open_folder


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults") / "shards"
    done = extract(*command(photos, out))
    assert done.returncode == 0, done.stderr
    return out


def command(images: Path, out: Path, *more: object) -> list[object]:
    return ["--images", images, "--out", out, "--images-per-shard", 4, "--device", "cpu", "--workers", 1, *more]


def table(out: Path) -> list[dict[str, object]]:
    return open_folder(out).table.to_pylist()


def test_two_commands_in_one_folder_share_the_work(photos: Path, undisturbed: Path, tmp_path: Path):
    out = tmp_path / "out"
    first = start("oscar-extract", *command(photos, out))
    until(lambda: any(out.glob(".tmp-shard-*/*.tar")), first)
    second = extract(*command(photos, out))
    assert second.returncode == 0, second.stderr
    printed, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    assert "12 in 3 shards" in printed
    assert "12 in 3 shards" in second.stdout
    assert contents(out) == contents(undisturbed)


@pytest.mark.parametrize(
    "lost", ["the rename of the tar", "the tar's bytes", "the index", "tidying up", "all but the manifest"]
)
def test_a_power_cut_costs_the_shard_it_hits(photos: Path, undisturbed: Path, tmp_path: Path, lost: str):
    """What may be found after one: names without content, content without its name, one file of a pair."""
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    if lost == "the rename of the tar":
        (out / ".tmp-shard-000001.0123456789abcdef").mkdir()
        (out / "shard-000001.tar").rename(out / ".tmp-shard-000001.0123456789abcdef" / "shard-000001.tar")
    elif lost == "the tar's bytes":
        os.truncate(out / "shard-000001.tar", 0)
    elif lost == "the index":
        (out / "shard-000001.parquet").unlink()
    elif lost == "tidying up":
        (out / ".tmp-shard-000001.decoding").write_bytes(bytes(32))
        (out / ".tmp-shard-000001.tar").write_bytes(b"of an earlier version")
    else:
        for path in out.iterdir():
            if path.name != "manifest.json":
                path.unlink()
    done = extract(*command(photos, out))
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(undisturbed)


def test_a_folder_that_cannot_be_written_is_named_before_the_work(photos: Path, disk: Callable[[str], Path]):
    place = disk("1m")
    (place / "o").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    for out in (place / "o", place / "new"):
        done = extract(*command(photos, out))
        assert done.returncode == 2
        assert f"--out {out}: cannot be written: Read-only file system; give another --out" in error_line(done)


@pytest.mark.slow
def test_an_image_that_takes_for_ever_is_refused_and_the_others_are_not(
    photos: Path, undisturbed: Path, tmp_path: Path
):
    """More of them than there are threads that decode."""
    images, out = Path(shutil.copytree(photos, tmp_path / "images")), tmp_path / "out"
    for number in range(3):
        (images / "size1" / f"slow{number}.jpg").write_bytes(slow_jpeg() + bytes([number]))
    done = oscar("oscar-extract", *command(images, out), "--image-timeout", "2", "--decode-threads", "2")
    assert done.returncode == 0, done.stderr
    assert "timeout: 3" in done.stdout
    assert {r["path"] for r in rejects(out)} == {f"size1/slow{n}.jpg" for n in range(3)}
    assert "--image-timeout 2 s" in rejects(out)[0]["message"]
    keys = ("key", "sha256", "features_xxh3", "boxes_xxh3")
    assert [[r[k] for k in keys] for r in table(out)] == [[r[k] for k in keys] for r in table(undisturbed)]


def test_the_same_image_under_two_names_is_one_sample_with_the_texts_of_both(photos: Path, tmp_path: Path):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    shutil.copy(photos / "size0/coffee.0.jpg", images / "b.jpg")
    shutil.copy(photos / "size0/coffee.0.jpg", images / "a.jpg")
    shutil.copy(photos / "size0/rocket.0.jpg", images / "c.jpg")
    (images / "broken1.jpg").write_bytes(b"no image")
    (images / "broken2.jpg").write_bytes(b"no image")
    os.mkfifo(images / "pipe.jpg")  # whoever opens it waits for a writer
    (images / "nowhere.jpg").symlink_to("gone.jpg")
    (images / "a.txt").write_text("A cup.\nCoffee.\n")
    (images / "b.txt").write_text("A cup.\nA mug.\n")
    done = extract(*command(images, out, "--captions", "txt", "--max-reject-fraction", 1))
    assert done.returncode == 0, done.stderr
    assert [(r["id"], [t["text"] for t in r["texts"]]) for r in table(out)] == [
        ("a", ["A cup.", "Coffee.", "A mug."]),
        ("c", []),
    ]
    reasons = {r["path"]: r["reason"] for r in rejects(out)}
    assert reasons == {
        "broken1.jpg": "not-an-image",
        "broken2.jpg": "not-an-image",
        "nowhere.jpg": "unreadable",
        "pipe.jpg": "unreadable",
    }
    left_out = pq.read_table(out / "_left-out.parquet").to_pylist()
    assert {(r["image"].rpartition("/")[2], r["reason"]) for r in left_out} == {
        ("b", "duplicate"),
        ("broken2", "duplicate"),
    }
    assert "duplicate: 2" in done.stdout
    both = extract(
        *command(images, tmp_path / "both", "--captions", "txt", "--duplicates", "keep", "--max-reject-fraction", 1)
    )
    assert both.returncode == 0, both.stderr
    assert [r["id"] for r in table(tmp_path / "both")] == ["a", "b", "c"]


def test_half_of_the_images_broken(photos: Path, tmp_path: Path):
    """The counts are right whatever is broken, equal bytes too; the fraction decides over the exit code."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(8):
        photo("coffee").crop((number, 0, number + 90, 60)).save(images / f"{number}.jpg")
        (images / f"{number}.png").write_bytes(b"" if number < 2 else b"broken" + b"x" * (number // 4))
    done = extract(*command(images, out, "--max-reject-fraction", 0.4))
    assert done.returncode == 1
    assert "8 of 16 images were refused (0.500), more than --max-reject-fraction 0.4" in error_line(done)
    assert "not-an-image: 8" in done.stdout
    assert len(table(out)) == len(rejects(out)) == 8
    before = contents(out)
    done = extract(*command(images, out, "--max-reject-fraction", 0.5))
    assert done.returncode == 0, done.stderr
    after = contents(out)
    assert after.pop("_job.json") != before.pop("_job.json")  # it has the fraction
    assert after == before


def test_a_few_images_of_a_corpus_are_not_outnumbered_by_all_that_is_missing(photos: Path, tmp_path: Path):
    """--limit takes some of those that are there; without it what is missing counts, and ends the job at once."""
    root, out = tmp_path / "flickr30k", tmp_path / "out"
    shutil.copytree(photos / "size0", root / "flickr30k-images")
    names = [*(p.name for p in (root / "flickr30k-images").iterdir()), *(f"gone{n}.jpg" for n in range(20))]
    (root / "results_20130124.token").write_text("".join(f"{name}#0\tA photo.\n" for name in names))
    given = ["--dataset", "flickr30k", "--root", root, "--out", out, "--device", "cpu", "--workers", 1]
    done = extract(*given)
    assert done.returncode == 1
    assert "20 of 28 images are missing (0.714, like flickr30k/gone0" in error_line(done)
    assert sorted(p.name for p in out.iterdir()) == ["_missing.parquet"]
    assert f"{out / '_missing.parquet'} lists them" in error_line(done)
    assert "flickr30k/gone0" in pq.read_table(out / "_missing.parquet")["image"].to_pylist()
    done = extract(*given, "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert len(table(out)) == 2
    assert not (out / "_missing.parquet").exists()

    before = contents(out)
    (out / "_left-out.parquet").write_bytes(b"another plan's")
    done = extract(*given)
    assert done.returncode == 1
    after = contents(out)
    after.pop("_missing.parquet")
    assert after == before | {"_left-out.parquet": b"another plan's"}


def test_another_detector_is_refused_with_both_named(photos: Path, undisturbed: Path, tmp_path: Path):
    before = contents(undisturbed)
    config = Path(sys.modules["oscar_extract"].__file__ or "").parent / "builtin"
    (tmp_path / "other.yaml").write_text((config / "config.yaml").read_text())
    weights = config / "model.safetensors"
    (tmp_path / "names").write_text("\n".join(f"thing {n}" for n in range(80)))
    done = extract(
        *command(photos, undisturbed, "--detector", tmp_path / "other.yaml"),
        *("--weights", weights, "--classes", tmp_path / "names"),
    )
    assert done.returncode == 2
    assert "holds shards of detector builtin (model.safetensors" in error_line(done)
    assert f"this is {tmp_path}/other.yaml" in error_line(done)
    assert contents(undisturbed) == before


def test_a_dry_run_writes_nothing(photos: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = extract(*command(photos, out, "--dry-run", "--limit", 9, "--shuffle-seed", 1))
    assert done.returncode == 0, done.stderr
    for part in ("all, each image once", "9 in 3 shards of up to 4", "images/s", "time", "GB a process"):
        assert part in done.stdout
    assert not out.exists()


@pytest.mark.slow
def test_two_thousand_files_of_which_half_are_broken_and_no_memory_growth(tmp_path: Path):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    coffee = photo("coffee")
    for number in range(1000):
        x, y = number % 50, number // 50
        coffee.crop((x, y, x + 160, y + 120)).save(images / f"{number:04}.jpg")
        (images / f"{number:04}.png").write_bytes((images / f"{number:04}.jpg").read_bytes()[: 100 + number])
    arguments = command(images, out, "--images-per-shard", 200, "--max-reject-fraction", 0.4)
    process = start("oscar-extract", *arguments)
    sizes = []
    for tars in range(2, 11):
        until(lambda n=tars: len(list(out.glob("*.tar"))) >= n or process.poll() is not None, process, 600)  # type: ignore[misc]
        sizes.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096)
        if tars == 9:
            break
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "1000 of 2000 images were refused (0.500), more than --max-reject-fraction 0.4" in errors
    assert "1,000 in 10 shards" in printed
    assert max(sizes[-3:]) < 1.1 * max(sizes[:3])
