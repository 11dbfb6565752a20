"""`oscar-extract` as a user runs it: real photos, real kills, real mistakes."""

import importlib.util
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset
from support import contents, error_line, extract, oscar, start

ARGUMENTS = ("--images-per-shard", 3, "--device", "cpu", "--source", "photos")


@pytest.fixture(scope="module")
def images(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos, with captions for some beside them, one file that is cut and one that is no image."""
    folder = tmp_path_factory.mktemp("job") / "images"
    shutil.copytree(photos, folder)
    (folder / "cut.jpg").write_bytes((folder / "size0/coffee.0.jpg").read_bytes()[:3000])
    (folder / "page.png").write_text("<html>not found</html>")
    for path in (folder / "size1").glob("*.jpg"):
        path.with_suffix(".txt").write_text(f"A photo called {path.stem}.\nThe same again.\n")
    return folder


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "shards"
    done = oscar("oscar-extract", "--images", images, "--captions", "txt", "--out", out, *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert "14 images" in done.stdout
    assert "not-an-image: 1" in done.stdout
    return out


def test_what_is_extracted_is_verified_and_its_indexes_are_made_again_to_the_bit(undisturbed: Path, tmp_path: Path):
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    done = oscar("oscar-shards", "verify", folder)
    assert done.stdout.startswith("5 shards, 12 images, 8 texts: no fault ("), done.stdout + done.stderr
    for index in folder.glob("shard-??????.parquet"):
        index.unlink()
    assert oscar("oscar-shards", "verify", folder).returncode == 1
    assert oscar("oscar-shards", "index", folder).returncode == 0
    assert contents(folder) == contents(undisturbed)


def test_int8_shards_are_extracted_and_never_mixed_with_others(images: Path, tmp_path: Path):
    arguments = ("--images", images / "size0", "--out", tmp_path, *ARGUMENTS)
    assert extract(*arguments, "--dtype", "int8").returncode == 0
    done = oscar("oscar-shards", "verify", tmp_path)
    assert done.returncode == 0, done.stdout
    refused = extract(*arguments)
    assert refused.returncode == 2
    assert "dtype" in error_line(refused)


def test_every_image_is_a_sample_or_a_reject(images: Path, undisturbed: Path):
    urls = sorted(str(p) for p in undisturbed.glob("*.tar"))
    assert [Path(u).name for u in urls] == [f"shard-{n:06d}.tar" for n in range(5)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    rejects = [r for p in sorted(undisturbed.glob("*.rejects.parquet")) for r in pq.read_table(p).to_pylist()]
    assert {(r["path"], r["reason"]) for r in rejects} == {("cut.jpg", "truncated"), ("page.png", "not-an-image")}
    paths = {s["json"]["image"]["path"] for s in samples} | {r["path"] for r in rejects}
    assert paths == {str(p.relative_to(images)) for p in images.rglob("*.*g")}
    manifest = json.loads((undisturbed / "manifest.json").read_bytes())
    for sample in samples:
        k = len(sample["json"]["tags"])
        assert 10 <= k <= 100
        assert sample["features.npy"].shape == (k, manifest["detector"]["feature_dim"])
        assert set(sample["json"]["tags"]) <= set(manifest["detector"]["classes"])
        assert len(sample["json"]["texts"]) == (2 if sample["json"]["image"]["path"].startswith("size1") else 0)
    assert manifest["plan"]["num_texts"] == sum(len(s["json"]["texts"]) for s in samples) == 8


def test_the_same_command_again_changes_nothing(images: Path, undisturbed: Path):
    before, times = contents(undisturbed), {p.name: p.stat().st_mtime_ns for p in undisturbed.iterdir()}
    done = extract("--images", images, "--captions", "txt", "--out", undisturbed, *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert "nothing was left to do" in done.stdout
    assert contents(undisturbed) == before
    assert {p.name: p.stat().st_mtime_ns for p in undisturbed.iterdir()} == times


def test_killed_and_continued_equals_undisturbed(images: Path, undisturbed: Path, tmp_path: Path):
    """kill -9 once as soon as each of three stages is reached, then let it finish: the same folder, bit for bit."""
    out = tmp_path / "shards"
    command = ["oscar-extract", "--images", images, "--captions", "txt", "--out", out, *ARGUMENTS]
    for stage in ("manifest.json", ".tmp-shard-000001.*/*.tar", "shard-000002.tar"):
        process = start(*command)
        deadline = time.monotonic() + 120
        while not any(out.glob(stage)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"the job ended before {stage} was there"
        for tar in out.glob("shard-*.tar"):  # what has its final name is whole
            assert tar.read_bytes() == (undisturbed / tar.name).read_bytes()
    done = oscar(*command)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(undisturbed)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (["--min-boxes", 12], ["min_boxes 10", "12"]),
        (["--images-per-shard", 4], ["images_per_shard 3", "4"]),
        (["--captions", "none"], ["--captions none", "no such file"]),
        (["--name", "other"], ["name shard", "other"]),
    ],
)
def test_another_plan_is_refused_with_both_named(
    images: Path, undisturbed: Path, change: list[object], names: list[str]
):
    before = contents(undisturbed)
    done = extract("--images", images, "--captions", "txt", "--out", undisturbed, *ARGUMENTS, *change)
    assert done.returncode == 2
    assert all(name in error_line(done) for name in names)
    assert contents(undisturbed) == before


def test_overwrite_starts_anew_and_spares_other_files(photos: Path, undisturbed: Path, tmp_path: Path):
    out = tmp_path / "shards"
    shutil.copytree(undisturbed, out)
    (out / "notes.txt").write_text("mine")
    few = tmp_path / "few"
    shutil.copytree(photos / "size1", few)
    done = extract("--images", few, "--out", out, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == [
        "_job.json",
        "_plan.parquet",
        "manifest.json",
        "notes.txt",
        "shard-000000.parquet",
        "shard-000000.tar",
    ]


def test_too_many_rejects_exit_1_and_retry_mends_them(photos: Path, tmp_path: Path):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    good = (photos / "size0/coffee.0.jpg").read_bytes()
    (images / "a.jpg").write_bytes(good)
    (images / "b.jpg").write_bytes(good[:3000])
    command = ("--images", images, "--out", out, "--max-reject-fraction", 0.1)
    done = extract(*command)
    assert done.returncode == 1
    assert "1 of 2 images were refused" in error_line(done)
    (images / "b.jpg").write_bytes(good)
    done = extract(*command, "--retry-rejects")
    assert done.returncode == 0, done.stderr
    assert not list(out.glob("*.rejects.parquet"))


def test_a_flipped_bit_in_a_tar_is_named_and_joins_no_caption_to_another_image(photos: Path, tmp_path: Path):
    """The header of one .txt, in the middle: before it was noticed, the next caption came to that image."""
    tar, out = tmp_path / "images/00000.tar", tmp_path / "out"
    tar.parent.mkdir()
    pictures = sorted(photos.rglob("*.jpg"))[:5]
    with tarfile.open(tar, "w") as archive:
        for number, picture in enumerate(pictures):
            for name, content in ((f"{number}.jpg", picture.read_bytes()), (f"{number}.txt", b"Caption %d." % number)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with tarfile.open(tar) as archive:
        header = archive.getmember("3.txt").offset
    content = bytearray(tar.read_bytes())
    content[header] ^= 4  # 3.txt becomes 7.txt
    tar.write_bytes(content)

    command = ("--images", tar.parent, "--out", out, *ARGUMENTS)
    refused = extract(*command, "--max-reject-fraction", 0.2)
    assert refused.returncode == 1
    assert "of 5 images are missing" in error_line(refused)
    assert "00000.tar" in error_line(refused)

    done = extract(*command)
    assert done.returncode == 0, done.stderr
    assert f"warning: 00000.tar is damaged: no tar header at byte {header:,} (bad checksum)" in done.stderr
    samples = [s for p in sorted(out.glob("*.tar")) for s in webdataset.WebDataset(str(p), shardshuffle=False).decode()]
    assert [(s["json"]["image"]["path"], s["json"]["texts"][0]["text"]) for s in samples] == [
        (f"00000.tar/{n}.jpg", f"Caption {n}.") for n in range(3)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--imags", "x"], "No such option '--imags'"),
        (["--out", "o"], "no images: give --images DIR"),
        (["--images", "absent", "--out", "o"], "--images absent: no such folder"),
        (["--images", "empty", "--out", "o"], "no image in it, only 1 other files"),
        (["--images", "."], "give --out DIR"),
        (["--images", ".", "--out", "file"], "--out file: file is a file; give a folder"),
        (["--images", ".", "--out", "o", "--min-boxes", "50", "--max-boxes", "40"], "--min-boxes 50 is more than"),
        (["--images", ".", "--out", "o", "--score-threshold", "2"], "--score-threshold: 2.0 is out of range"),
        (["--images", ".", "--out", "o", "--detector", "bultin"], "did you mean 'builtin'"),
        (["--images", ".", "--out", "o", "--name", "a/b"], "--name 'a/b'"),
        (["--dataset", "coko"], "no dataset 'coko' (did you mean 'coco'?"),
        (["--dataset", "coco"], "--root: 0 given for --dataset coco; give one"),
        (["--dataset", "coco", "--root", "nowhere"], "--root nowhere: no such folder"),
        (["--dataset", "coco", "--root", "empty", "--out", "o"], "no captions_*.json or instances_*.json in it"),
        (
            ["--dataset", "coco", "--root", ".", "--splits", "trian"],
            "--splits: 'trian' is not allowed (did you mean 'train'?",
        ),
        (["--dataset", "coco", "--root", ".", "--captions", "c.json"], "a --dataset brings its own texts"),
        (["--images", ".", "--root", "."], "it goes with --dataset"),
        (["--images", "empty", "--out", "o", "--exclude", "no.txt"], "--exclude no.txt: no such file"),
        (["--images", ".", "--out", "o", "--workers", "2", "--scheduler", "x"], "give one of them"),
        (["--pipeline", "demmo"], "did you mean 'demo'"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_2(tmp_path: Path, monkeypatch, arguments: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.md").write_text("no image")
    done = extract(*arguments)
    assert done.returncode == 2
    assert message in error_line(done)
    assert not (tmp_path / "o").exists()


def test_captions_of_other_images_are_refused(photos: Path, tmp_path: Path):
    captions = tmp_path / "c.json"
    content = {"images": [{"id": 1, "file_name": "z.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "Z."}]}
    captions.write_text(json.dumps(content))
    done = extract("--images", photos, "--captions", captions, "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "none of its 1 texts names an image" in error_line(done)
    assert not (tmp_path / "o").exists()


def test_a_full_disk_is_named_and_leaves_nothing_half_written(photos: Path, disk: Callable[[str], Path]):
    tiny_disk = disk("64k")
    done = extract("--images", photos / "size1", "--out", tiny_disk / "o")
    assert done.returncode == 1
    assert "No space left on device" in error_line(done)
    assert "shard-000000.tar" in error_line(done)
    left = ["_claims", "_job.json", "_plan.parquet", "manifest.json"]  # a claim says that the shard was given back
    assert sorted(p.name for p in (tiny_disk / "o").iterdir()) == left


@pytest.mark.parametrize("command", ["oscar_extract", "oscar_train"])
def test_help_answers_without_loading_torch(command: str):
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Examples:" in done.stdout
    assert "import time" in done.stderr
    assert not any(
        line.split("|")[-1].strip() in ("torch", "detectron2", "transformers") for line in done.stderr.splitlines()
    )


def test_without_detectron2_one_line_says_how_to_get_it(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "detectron2" else found(name))
    done = extract("--images", photos, "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "python -m oscar_extract.install_detectron2" in error_line(done)
