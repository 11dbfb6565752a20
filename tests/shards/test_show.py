"""The contact sheet shows what is stored, filters it, and nothing that a shard holds can do harm to it or by it."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import look, needs_chromium, screenshot
from PIL import Image
from small_shards import make_samples, write_folder
from support import error_line, run_here

from oscar_shards.__main__ import command
from oscar_shards.pages.page import visible
from oscar_shards.pages.photos import embedded, find_photos
from oscar_shards.pages.view import boxes_of, figure, regions_of
from oscar_shards.read import open_folder, read_boxes

COUNT = 12
EVIL = """"'><img src=x onerror="window.hacked=1"></script><script>window.hacked=2</script>"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in two shards, with their photos (blue) beside them; 9 has none."""
    folder = tmp_path_factory.mktemp("show")
    samples = make_samples(COUNT)
    write_folder(folder / "shards", samples)
    (folder / "images").mkdir()
    for sample in samples:
        if sample.image.id != "9":
            size = (sample.image.width, sample.image.height)
            Image.new("RGB", size, (20, 40, 200)).save(folder / "images" / sample.image.path)
    return folder


def show(folder: Path, *flags: object) -> Path:
    """Run the command and return its page."""
    page = folder / "page.html"
    done = run_here(command, "show", folder / "shards", "--html", page, *flags)
    assert done.returncode == 0, done.stderr
    assert str(page) in done.stdout
    assert len(done.stdout.splitlines()) == 1
    return page


def foreign(path: Path, images: dict[str, tuple[Any, Any]]) -> Path:
    """Write a tar of another writer: (JSON, boxes) of each key, without index or manifest, and with no check at all."""
    with tarfile.open(path, "w") as tar:
        for key, (content, boxes) in images.items():
            boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
            for name, array in (("boxes", boxes), ("features", np.zeros((len(boxes), 8), np.float16))):
                buffer = io.BytesIO()
                np.save(buffer, array)
                _add(tar, f"{key}.{name}.npy", buffer.getvalue())
            _add(tar, f"{key}.json", json.dumps(content).encode())
    return path


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


HANDLE = Path(__file__).with_name("handle_sheet.js")
LOOK = Path(__file__).with_name("look_at_sheet.js")


@needs_chromium
def test_in_a_browser_boxes_lie_where_they_are_stored_and_the_filters_work(shards):
    rows = open_folder(shards / "shards").table.to_pylist()
    page = show(shards, "--images", shards / "images")
    found = look(page, LOOK.read_text(), "#tag=dog&score=0.4")
    strong = [
        (r["key"], t) for r in rows for t, s in zip(r["tags"], r["scores"], strict=True) if s >= 0.4 and t == "dog"
    ]
    assert found["opened"]["tag"] == "dog"
    assert found["opened"]["least"] == "0.40"
    assert found["opened"]["shown"] == list(dict.fromkeys(key for key, _ in strong))
    assert found["opened"]["strong"] == ["dog"] * len(strong)

    total = sum(r["num_boxes"] for r in rows)
    assert found["all"]["shown"] == [r["key"] for r in rows]
    assert found["all"]["count"] == f"showing {COUNT} of {COUNT} images, {total} of {total} boxes"
    assert found["all"]["hash"] == "#score=0"
    assert [n is None for n in found["natural"]] == [r["id"] == "9" for r in rows]
    assert all(n > 0 for n in found["natural"] if n is not None)
    cats = sum("cat" in r["tags"] for r in rows)
    assert found["options"]["cat"] == f"{cats} images"
    folder = open_folder(shards / "shards")
    for row, boxes, labels in zip(rows, found["boxes"], found["labels"], strict=True):
        stored = read_boxes(folder.tars[row["shard"]], row)[::-1]  # the surest on top
        expected = stored / ([row["width"], row["height"]] * 2)
        assert np.abs(np.array(boxes).reshape(-1, 4) - expected).max(initial=0) < 0.005
        said = [f"{t} {s:.2f}" for t, s in zip(row["tags"], row["scores"], strict=True)]
        assert labels == said[::-1]

    pizza = [r["key"] for r in rows if "pizza" in r["tags"]]
    assert found["pizza"]["shown"] == found["part"] == pizza
    assert found["pizza"]["strong"] == ["pizza"] * sum(r["tags"].count("pizza") for r in rows)
    assert found["pizza"]["hash"] == "#tag=pizza&score=0"
    dogs = [r["key"] for r in rows if any("a dog and a" in (t["text"] or t["question"]) for t in r["texts"])]
    assert 0 < len(dogs) < COUNT
    assert found["text"]["shown"] == dogs
    assert found["text"]["count"].startswith(f"showing {len(dogs)} of {COUNT} images")
    assert found["hash"] == {"strong": sum(s >= 0.9 for r in rows for s in r["scores"]), "labels": 0}
    assert found["hover"]
    assert all(found["hover"])
    assert found["chip"][0]
    assert found["chip"][1].startswith("#tag=")
    assert found["dialog"] == [True, "image-001", rows[1]["num_boxes"]]
    assert found["next"] == "image-002"
    assert found["closed"]


@needs_chromium
def test_on_the_screen_there_is_the_photo_with_a_box_on_it(shards):
    page = show(shards, "--images", shards / "images", "--key", "image-006")
    seen = screenshot(page, "#score=0&labels=0", "500,700").astype(int)
    blue = (np.abs(seen - [20, 40, 200]).max(-1) < 12).mean()
    assert blue > 0.1
    bare = screenshot(page, "#score=1&labels=0", "500,700").astype(int)
    inked = np.abs(seen - bare).max(-1) > 60
    assert 500 < inked.sum() < 0.1 * inked.size


EVIL_TEXTS = [{"kind": "caption", "source": EVIL, "text": EVIL}, {"kind": "qa", "question": EVIL, "answer": EVIL}, None]
HOSTILE: dict[str, tuple[Any, Any]] = {
    "a": (
        {
            "image": {"source": EVIL, "id": EVIL, "path": EVIL, "width": 0, "height": 10**9},
            "tags": [EVIL],
            "scores": [0.9],
            "attributes": [[{"id": 1, "name": EVIL, "score": 0.5}]],
            "texts": EVIL_TEXTS,
        },
        [[1, 2, 30, 40]],
    ),
    "b": (
        {"image": {"width": 2**31 - 1, "height": 1}, "tags": ["a\u202eb\x00c\x1b[31m"], "scores": [0.9, 0.8, 0.7]},
        [[float("nan"), 0, 1, 1], [5, 5, 1, 1], [-1e30, -1e30, 1e30, 1e30]],
    ),
    "c": ({}, [[0, 0, 9, 9]] * 2),
    "d": ({"image": {"width": 10, "height": 10}, "tags": ["x"] * 9, "scores": []}, []),
    'e"><script>window': ({"image": {"width": -5, "height": 5}, "tags": []}, [[1e9, 1e9, 2e9, 2e9]]),
}


@needs_chromium
def test_in_a_browser_what_hostile_shards_hold_is_text_and_no_more(tmp_path):
    (tmp_path / "shards").mkdir()
    foreign(tmp_path / "shards" / "x.tar", HOSTILE)
    found = look(
        show(tmp_path),
        HANDLE.read_text(),
        "#tag=%22%3E%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E",
    )
    assert found["hacked"] == "undefined"
    assert (found["images"], found["scripts"]) == (0, 3)  # the page's own, and two of this test
    assert found["keys"] == list(HOSTILE)
    assert found["text"] == found["tag"] == EVIL


def test_only_as_many_shards_are_read_as_are_needed(shards, tmp_path):
    (tmp_path / "shards").mkdir()
    for path in (shards / "shards").iterdir():
        (tmp_path / "shards" / path.name).write_bytes(path.read_bytes() if "-000001." not in path.name else b"damaged")
    assert show(tmp_path, "--limit", 9).read_text().count("<figure>") == 9
    assert show(tmp_path, "--key", "image-002").read_text().count("<figure>") == 1
    assert "shard-000001" in error_line(run_here(command, "show", tmp_path / "shards", "--limit", 10))


def test_images_are_chosen_by_key_and_tag(shards):
    rows = open_folder(shards / "shards").table.to_pylist()
    with_dog = sum("dog" in r["tags"] for r in rows)
    content = show(shards, "--tag", "dog").read_text()
    assert content.count("<figure>") == with_dog
    assert 'id="tag" list="tags" value="dog"' in content
    either = sum(bool({"dog", "zebra"} & set(r["tags"])) for r in rows)
    assert show(shards, "--tag", "dog", "--tag", "zebra").read_text().count("<figure>") == either
    assert show(shards, "--key", "image-011", "--key", "image-000").read_text().count("<figure>") == 2


def test_a_tar_without_index_or_manifest_will_do(tmp_path):
    tar = foreign(
        tmp_path / "other.tar", {"k": ({"image": {"width": 9, "height": 9}, "tags": ["cat"]}, [[1, 2, 3, 4]])}
    )
    done = run_here(command, "show", tar, "--html", tmp_path / "page.html")
    assert done.returncode == 0
    assert '<rect x="1.00" y="2.00" width="2.00" height="2.00"' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--key", "image-0003"], "did you mean 'image-003'"),
        (["--tag", "zebr"], "did you mean 'zebra'"),
        (["--images", "nowhere"], "no such folder"),
        (["--html", "no/where.html"], "no such folder"),
    ],
)
def test_what_is_not_there_is_named_with_what_to_give(shards, flags, said):
    done = run_here(command, "show", shards / "shards", *flags)
    assert done.returncode == 2
    line = error_line(done)
    assert said in line
    assert flags[0] in line


def test_no_path_leads_out_of_the_folder_of_photos(tmp_path):
    images, secret = tmp_path / "images", tmp_path / "secret.png"
    (images / "deep").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(secret)
    (images / "link.png").symlink_to(secret)
    (images / "out").symlink_to(tmp_path)
    (images / "loop").symlink_to(images / "loop")
    paths = ["../secret.png", str(secret), "link.png", "out/secret.png", "loop", "a\0b", "x" * 5000, "", None, "."]
    assert find_photos(images, [{"path": p, "id": p, "key": "secret"} for p in paths]) == [None] * len(paths)


def test_a_photo_is_found_by_path_else_by_name_else_by_id(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/b/1.png", "a/2.png", "000007.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows = [{"path": "a/b/1.png"}, {"path": "elsewhere/2.png"}, {"path": "x/y.jpg", "id": "000007"}, {"path": "z.png"}]
    found = find_photos(tmp_path, rows)
    assert [p and p.name for p in found] == ["1.png", "2.png", "000007.png", None]


def test_photos_that_cannot_be_shown_leave_a_blank_canvas(tmp_path):
    whole = io.BytesIO()
    Image.new("RGB", (3000, 2000), "red").save(whole, "JPEG")
    files = {
        "cut.jpg": whole.getvalue()[:9000],
        "text.png": b"no photo",
        "empty.gif": b"",
        "ps.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    assert list(embedded([tmp_path / name for name in [*files, "bomb.png", "none"]])) == [None] * 6
    turned = tmp_path / "turned.jpg"
    Image.new("RGB", (3000, 2000)).save(
        turned, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    )
    (picture,) = embedded([turned])
    assert picture is not None
    assert picture[1] < picture[2] == 720


@pytest.mark.parametrize("count", [10**9, -1, None, 3])
def test_an_index_that_lies_reads_no_boxes(tmp_path, count):
    tar = tmp_path / "x.tar"
    tar.write_bytes(bytes(100))
    for begin, size in ((0, 48), (64, 48), (-5, 16), (10, 16 * (count or 0)), (None, None)):
        row = {"key": "k", "num_boxes": count, "boxes_offset": begin, "boxes_bytes": size, "tags": None}
        boxes = boxes_of(tar, row)
        assert len(boxes) in (0, 3)
        assert figure(row, boxes, None).startswith("<figure>")


def test_labels_are_paired_as_far_as_they_go_and_the_surest_is_last():
    boxes = np.array([[0, 0, 1, 1], [5, 5, 2, 3], [np.nan, 0, 1, 1], [0, np.inf, 1, 1]], np.float32)
    row = {
        "tags": ["a", None, "c"],
        "scores": [0.9, float("nan")],
        "attributes": [[None, {"name": "red", "score": None}]],
    }
    regions = regions_of(row, boxes)
    assert [(r.tag, r.score) for r in regions] == [("", None), ("a", pytest.approx(0.9))]
    assert regions[0].box == (2, 3, 5, 5)
    assert regions[1].says == "a 0.90: red"


def test_characters_that_act_are_not_passed_on():
    assert visible("a\x1b[31m\u202eb\nc\ud800") == "a�[31m�b c�"
    assert visible("x" * 2000, 10) == "x" * 10 + "…"
