"""A tar of images gives each image its own texts, or its damage is named: no bit and no cut joins a text to another."""

import io
import os
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oscar_common.errors import UsageError
from oscar_common.settings import Catalog, Extract
from oscar_extract.plan import plan_of
from oscar_extract.sources.inventory import Scan, scan_tar
from oscar_extract.sources.request import make_request

Pairs = list[tuple[str, bytes, str | None]]
FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
BLOCK = 512


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(content), 1.5 if archive.format == tarfile.PAX_FORMAT else 1
    archive.addfile(member, io.BytesIO(content))


def tar_of(path: Path, form: str = "ustar", count: int = 4, texts: bool = True) -> Path:
    """A tar as webdataset writes it: each image and then its texts; in pax form with a header more for each of them."""
    with tarfile.open(path, "w", format=FORMS[form]) as archive:
        for number in range(count):
            add(archive, f"{number}.jpg", f"image {number}".encode())
            if texts:
                add(archive, f"{number}.json", f'{{"url": "http://{number}"}}'.encode())
                add(archive, f"{number}.txt", f"text {number}".encode())
    return path


def scanned(path: Path) -> tuple[Pairs, Scan]:
    """Images as a worker finds them, with their texts; and what was found wrong."""
    scan = scan_tar((0, path, path.name))
    content = path.read_bytes()
    rows = scan.files.to_pylist()
    return [(r["path"], content[r["offset"] : r["offset"] + r["size"]], r["text"]) for r in rows], scan


def each_bit_flipped(path: Path, places: Iterable[int]) -> Iterator[str]:
    """Flip every bit of some bytes of a file, one after the other, and put it right again."""
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for place in places:
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([whole[place] ^ 1 << bit]), place)
                yield f"bit {bit} of byte {place}"
            os.pwrite(file.fileno(), whole[place : place + 1], place)


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_in_a_header_never_joins_a_text_to_another_image(tmp_path, form):
    path = tar_of(tmp_path / "x.tar", form)
    sound, scan = scanned(path)
    assert [pair[1:] for pair in sound] == [(f"image {n}".encode(), f"text {n}") for n in range(4)]
    assert scan.fault == ""

    with tarfile.open(path) as archive:
        headers = {m.name: range(m.offset, m.offset_data) for m in archive}
    for name, count in (("1.jpg", {0, 4}), ("1.txt", {1, 4}), ("3.json", {3, 4})):
        places = [n for n in headers[name] if path.read_bytes()[n] or (name == "1.txt" and form == "ustar")]
        for flipped in each_bit_flipped(path, places):
            pairs, scan = scanned(path)
            assert pairs == sound[: len(pairs)], flipped
            assert scan.fault or len(pairs) == len(sound), flipped
            assert len(pairs) in count, flipped


@pytest.mark.parametrize("form", ["ustar", "pax"])
def test_a_tar_that_is_cut_anywhere_is_named_and_gives_whole_pairs(tmp_path, form):
    path = tar_of(tmp_path / "x.tar", form)
    sound, _ = scanned(path)
    with tarfile.open(path) as archive:
        end = max(-(-(m.offset_data + m.size) // BLOCK) * BLOCK for m in archive)
    counts = set()
    for size in range(end + 3 * BLOCK, -1, -1):
        if size % 17 and (size + 1) % BLOCK > 2:
            continue
        os.truncate(path, size)
        pairs, scan = scanned(path)
        assert pairs == sound[: len(pairs)]
        assert bool(scan.fault) == (size < end + BLOCK)
        counts.add(len(pairs))
    assert counts == {0, 1, 2, 3, 4}


def test_images_without_texts_are_used_up_to_the_damage(tmp_path):
    path = tar_of(tmp_path / "x.tar", texts=False)
    os.truncate(path, 3 * 2 * BLOCK + 100)
    pairs, scan = scanned(path)
    assert [name for name, *_ in pairs] == ["x.tar/0.jpg", "x.tar/1.jpg", "x.tar/2.jpg"]
    assert "the file ends" in scan.fault


@pytest.mark.parametrize("what", ["a block of zeros", "another tar", "a size", "a sparse file"])
def test_what_would_make_a_tar_silently_short_is_named(tmp_path, what):
    path = tar_of(tmp_path / "x.tar", "gnu")
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        begin = archive.getmember("3.jpg").offset
    if what == "a block of zeros":
        content[begin : begin + BLOCK] = bytes(BLOCK)
    elif what == "another tar":
        content += bytes(content)
    elif what == "a size":
        content[begin + 124 : begin + 136] = b"\x80" + (1 << 60).to_bytes(11, "big")
        content[begin + 148 : begin + 156] = b" " * 8
        content[begin + 148 : begin + 156] = b"%06o\0 " % sum(content[begin : begin + BLOCK])
    else:
        holes = tmp_path / "3.jpg"
        with holes.open("wb") as file:
            file.truncate(1 << 20)
        subprocess.run(["tar", "--sparse", "-rf", path, "-C", tmp_path, holes.name], check=True)
        content = bytearray(path.read_bytes())
    path.write_bytes(content)
    pairs, scan = scanned(path)
    assert [text for *_, text in pairs] == [f"text {n}" for n in range(4 if len(pairs) == 4 else 3)]
    assert {
        "a block of zeros": "something follows the end",
        "another tar": "something follows the end",
        "a size": "'3.jpg' should end at byte 1,152,9",
        "a sparse file": "write the tar without --sparse",
    }[what] in scan.fault


def planned(folder: Path) -> tuple[int, int]:
    """How many images are planned and how many are missing."""
    asked = Extract(images=str(folder))
    record = plan_of(make_request(asked, Catalog()), asked).record
    return record.num_images, record.num_missing


def test_images_behind_a_damage_count_as_missing_by_the_bytes_of_those_before(tmp_path):
    (tmp_path / "images").mkdir()
    path = tar_of(tmp_path / "images/x.tar", count=100)
    with tarfile.open(path) as archive:
        begin = archive.getmember("60.json").offset
    next(each_bit_flipped(path, [begin]))
    images, missing = planned(tmp_path / "images")
    assert images == 60
    assert 38 <= missing <= 44
    (tmp_path / "images/weights.pth.tar").write_bytes(b"PK\3\4" + bytes(10_000_000))
    assert planned(tmp_path / "images") == (60, missing + 1), "no tar of images at all"


def test_the_table_beside_a_tar_says_how_many_images_a_cut_took(tmp_path):
    path = tar_of(tmp_path / "00000.tar", count=100)
    os.truncate(path, path.stat().st_size // 2)
    listed = {"key": [str(n) for n in range(100)], "url": ["u"] * 100, "status": ["success"] * 100}
    pq.write_table(pa.table(listed | {"caption": [f"text {n}" for n in range(100)]}), path.with_suffix(".parquet"))
    images, missing = planned(tmp_path)
    assert images + missing == 100
    assert 45 <= images <= 55


def test_a_folder_of_which_no_tar_can_be_used_is_refused_with_the_damage(tmp_path):
    path = tar_of(tmp_path / "x.tar")
    os.truncate(path, 700)
    with pytest.raises(UsageError, match=r"no image in it.*; x\.tar: cut off: .* of 700"):
        planned(tmp_path)


def test_what_tar_itself_writes_is_read(tmp_path):
    """Folders, links, long names and GNU's times where others have the beginning of a name."""
    folder = tmp_path / "f"
    inner = folder / ("long" * 40) / ("name" * 40)
    inner.mkdir(parents=True)
    for name in ("a.jpg", "b.png"):
        (inner / name).write_bytes(name.encode())
        (inner / name).with_suffix(".txt").write_text(name)
    (folder / "link.jpg").symlink_to("nowhere")
    os.link(inner / "a.jpg", inner / "z-again.jpg")
    os.mkfifo(folder / "pipe.jpg")
    for flags in (["--format=gnu"], ["--format=posix"], ["--format=gnu", f"--listed-incremental={tmp_path}/times"]):
        path = tmp_path / "x.tar"
        subprocess.run(["tar", "--sort=name", *flags, "-cf", path, "-C", tmp_path, "f"], check=True)
        pairs, scan = scanned(path)
        assert scan.fault == ""
        assert [(Path(name).name, text) for name, _, text in pairs] == [("a.jpg", "a.jpg"), ("b.png", "b.png")]
        assert all(name == f"x.tar/{inner.relative_to(tmp_path)}/{text}" for name, _, text in pairs)
