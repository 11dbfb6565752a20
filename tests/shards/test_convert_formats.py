"""Round trips through every format give the same bits; files of other people are read as what they are."""

import base64
import csv
import dataclasses
import json
import pickle
import subprocess
import sys
import zipfile
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_shards import CLASSES, P, make_samples, write_folder
from support import contents, error_line, rejects, shards, until

from oscar_common.sample import Attribute, Text
from oscar_shards.manifest import read_manifest
from oscar_shards.read import open_folder, read_samples
from oscar_shards.write import Reject, shard_path, write_shard

FORMATS = ["oscar", "lxmert", "bottom-up", "npz"]
csv.field_size_limit(sys.maxsize)
LXMERT = ["img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes",
          "features"]  # fmt: skip
BOTTOM_UP = ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"]


def rich_samples():
    """Samples with attributes, odd ids, unicode, no tags, ground truth."""
    samples = make_samples(23)
    for n, sample in enumerate(samples):
        k = len(sample.regions.boxes)
        attributes = [[Attribute(id=n % 7, name=f"größe {n % 7}", score=0.1 + n / 77)] * (r % 3) for r in range(k)]
        regions = dataclasses.replace(sample.regions, attributes=attributes if n % 2 else [])
        if n == 9:
            regions = dataclasses.replace(regions, tags=[], scores=[])
        image = dataclasses.replace(sample.image, id=["a_b/c.jpg", "ö\t\n", "5", '"', "qa"][n % 5], source=f"s{n // 5}")
        extra = Text(kind="caption", source="ü", id="ß", text="Zeile\nTab\t 🐞 \"x\" \\ \u2028 'y'")
        truth = ["größe 🐞", "a\tb", "cat", "cat"][: n % 5] if n % 3 else []
        texts = [*sample.texts, extra]
        samples[n] = dataclasses.replace(sample, regions=regions, image=image, texts=texts, gt_tags=truth)
    return samples


def exported(folder, samples, format, dtype="float16"):
    write_folder(folder / "shards", samples, dtype=dtype)
    done = shards("export", format, folder / "shards", "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return folder / "out"


def imported(format, path, out, *options):
    done = shards("import", format, path, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    return [s for tar in sorted(out.glob("*.tar")) for s in read_samples(tar)]


def bare(out):
    for name in ("images.parquet", "manifest.json"):
        (out / name).unlink()
    return out


def names_file(folder):
    (folder / "names.txt").write_text("\n".join(CLASSES))
    return folder / "names.txt"


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_round_trip_gives_the_same_bits(tmp_path, format, dtype):
    out = exported(tmp_path, rich_samples(), format, dtype)
    done = shards("import", format, out, "--out", tmp_path / "back", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "delete it to have the files alone read" in done.stdout
    assert contents(tmp_path / "back") == contents(tmp_path / "shards")


@pytest.mark.parametrize("format", FORMATS)
def test_a_round_trip_of_one_tar_with_rejects_and_an_empty_one(tmp_path, format):
    folder = write_folder(tmp_path / "shards", make_samples(18))
    layout = read_manifest(folder, "").layout
    refused = [Reject(path=f"{n}.jpg", reason="truncated", message="cut") for n in range(2)]
    write_shard(shard_path(folder, "shard", 0), [refused[0], *make_samples(18)[:7], refused[1]], layout)
    write_shard(shard_path(folder, "shard", 1), refused, layout)
    assert shards("export", format, folder, "--out", tmp_path / "all").returncode == 0
    imported(format, tmp_path / "all", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    assert shards("export", format, folder / "shard-000000.tar", "--out", tmp_path / "one").returncode == 0
    imported(format, tmp_path / "one", tmp_path / "back1")
    one = contents(tmp_path / "back1")
    assert {n: c for n, c in one.items() if n != "manifest.json"} == {
        n: c for n, c in contents(folder).items() if n.startswith("shard-000000.")
    }
    assert shards("verify", tmp_path / "back1").returncode == 0


@pytest.mark.parametrize("format", ["lxmert", "npz"])
def test_without_the_sidecar_an_export_still_knows_its_classes(tmp_path, format):
    out = exported(tmp_path, make_samples(7), format)
    (out / "images.parquet").unlink()
    imported(format, out, tmp_path / "back")
    back = open_folder(tmp_path / "back")
    assert back.manifest.detector.classes == CLASSES
    tags = dict(zip(back.table["id"].to_pylist(), back.table["tags"].to_pylist(), strict=True))
    assert tags["2"] == make_samples(7)[2].regions.tags


def test_lxmerts_own_loader_reads_an_export(tmp_path):
    samples = make_samples(12)
    out = exported(tmp_path, samples, "lxmert")
    with (out / "features.tsv").open(newline="") as file:
        rows = {row["img_id"]: row for row in csv.DictReader(file, LXMERT, delimiter="\t")}
    assert list(rows) == [s.image.id for s in samples if s.regions.tags]
    for sample in samples:
        if not sample.regions.tags:
            continue
        row, k = rows[sample.image.id], len(sample.regions.boxes)
        assert (int(row["img_w"]), int(row["img_h"]), int(row["num_boxes"])) == (
            sample.image.width, sample.image.height, k)  # fmt: skip
        found = {n: np.frombuffer(base64.b64decode(row[n]), "i8" if n.endswith("_id") else "f4") for n in LXMERT[3:]
                 if n != "num_boxes"}  # fmt: skip
        assert [CLASSES[n] for n in found["objects_id"]] == sample.regions.tags
        np.testing.assert_array_equal(found["objects_conf"], np.float32(sample.regions.scores))
        np.testing.assert_array_equal(found["boxes"].reshape(k, 4), sample.regions.boxes)
        np.testing.assert_array_equal(found["features"].reshape(k, -1), sample.regions.features.astype("f4"))


def test_npz_files_are_plain_arrays(tmp_path):
    samples = rich_samples()
    out = exported(tmp_path, samples, "npz")
    for sample, id in zip(samples, pq.read_table(out / "images.parquet")["id"].to_pylist(), strict=True):
        with np.load(out / f"{id}.npz", allow_pickle=False) as file:
            assert sorted(file) == sorted(["x", "bbox", "num_bbox", "image_h", "image_w", "objects_id", "objects_conf",
                                           "attrs_id", "attrs_conf"])  # fmt: skip
            np.testing.assert_array_equal(file["x"], sample.regions.features.astype("f4"))
            np.testing.assert_array_equal(file["bbox"], sample.regions.boxes)
            assert (file["num_bbox"], file["image_w"]) == (len(sample.regions.boxes), sample.image.width)


def test_bottom_up_files_are_read_as_python_writes_them(tmp_path, rng):
    features = rng.normal(size=(5, 3, P)).astype("f4")
    boxes = np.tile(np.float32([0, 0, 10, 20]), (3, 1))
    with (tmp_path / "trainval_36.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, BOTTOM_UP, delimiter="\t")  # with \r\n at the end of a line
        for n in range(5):
            packed = {"boxes": base64.b64encode(boxes).decode(), "features": base64.b64encode(features[n]).decode()}
            writer.writerow({"image_id": 391895 + n, "image_w": 640, "image_h": 480, "num_boxes": 3} | packed)
    got = imported("bottom-up", tmp_path / "trainval_36.tsv", tmp_path / "back", "--source", "coco")
    assert [(s.key, s.image.source, s.image.id) for s in got][:1] == [("coco%2F391895", "coco", "391895")]
    assert got[0].regions.tags == got[0].regions.scores == []
    np.testing.assert_array_equal([s.regions.features for s in got], features.astype("f2"))
    assert shards("verify", tmp_path / "back").returncode == 0


def test_lxmerts_numbers_get_visual_genomes_names_or_those_given(tmp_path):
    samples = make_samples(12)
    out = bare(exported(tmp_path, samples, "lxmert"))
    known = imported("lxmert", out / "features.tsv", tmp_path / "a", "--classes", names_file(tmp_path), "--source", "x")
    with_regions = [s for s in samples if s.regions.tags]
    assert [s.regions.tags for s in known] == [s.regions.tags for s in with_regions]
    np.testing.assert_allclose(known[0].regions.scores, samples[0].regions.scores, rtol=1e-7)
    genome = imported("lxmert", out, tmp_path / "b")
    first = CLASSES.index(samples[0].regions.tags[0])
    assert genome[0].regions.tags[0] == read_manifest(tmp_path / "b", "").detector.classes[first]
    assert genome[0].image.source == "out"


def milvlg(path, rng, **changed):
    arrays = {"x": rng.normal(size=(3, P)).astype("f4"), "bbox": np.ones((3, 4), "f4"), "num_bbox": 3, "image_h": 480,
              "image_w": 640} | changed  # fmt: skip
    np.savez_compressed(path, **{n: a for n, a in arrays.items() if a is not None})


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def test_a_pickle_in_an_npz_is_not_executed(tmp_path, rng):
    (tmp_path / "f").mkdir()
    milvlg(tmp_path / "f/COCO_train2014_000000000009.npz", rng, info=np.array(Bomb(tmp_path / "mark"), object))
    milvlg(tmp_path / "f/b.npz", rng, x=np.array(Bomb(tmp_path / "mark"), object))
    done = shards("import", "npz", tmp_path / "f", "--out", tmp_path / "back", "--source", "coco")
    assert done.returncode == 1
    assert "`info` in these files is a pickled Python object" in done.stdout
    assert [s.image.id for s in read_samples(tmp_path / "back/shard-000000.tar")] == ["COCO_train2014_000000000009"]
    assert "1 rows were refused, the first: b.npz: x: an array of object is refused" in error_line(done)
    assert not (tmp_path / "mark").exists()
    with pytest.raises(ValueError, match="Object arrays"):
        np.load(tmp_path / "f/b.npz", allow_pickle=False)["x"]
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark"))).close()
    assert (tmp_path / "mark").exists()  # so it would have shown


def test_damaged_npz_files_become_rejects(tmp_path, rng):
    folder = tmp_path / "f"
    folder.mkdir()
    milvlg(folder / "0good.npz", rng)
    milvlg(folder / "a.npz", rng, image_w=None)
    milvlg(folder / "b.npz", rng, bbox=np.ones((4, 4), "f4"))
    milvlg(folder / "c.npz", rng, x=np.full((3, P), np.nan, "f4"))
    milvlg(folder / "d.npz", rng, x=np.full((3, P), 70000, "f4"))
    milvlg(folder / "e.npz", rng, x=np.ones((3, P + 1), "f4"))
    milvlg(folder / "f.npz", rng, num_bbox=4)
    milvlg(folder / "g.npz", rng, image_h=0)
    milvlg(folder / "h.npz", rng, x=np.array([["a"] * P] * 3))
    (folder / "i.npz").write_bytes((folder / "0good.npz").read_bytes()[:-40])
    huge = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000, 4), }".ljust(
        118
    )
    with zipfile.ZipFile(folder / "j.npz", "w") as archive:
        archive.writestr("bbox.npy", huge)
        archive.writestr("image_w.npy", huge)
    (folder / "k.npz").write_bytes(b"")
    done = shards("import", "npz", folder, "--out", tmp_path / "back")
    assert done.returncode == 1
    assert len(list(read_samples(tmp_path / "back/shard-000000.tar"))) == 1
    assert {r["path"][0]: r["reason"] for r in rejects(tmp_path / "back")} == {
        "a": "missing", "b": "shape", "c": "not-finite", "d": "too-large", "e": "size", "f": "shape", "g": "no-size",
        "h": "dtype", "i": "zip", "j": "npy", "k": "zip",
    }  # fmt: skip


def test_damaged_rows_become_rejects_with_a_name_and_a_reason(tmp_path):
    out = bare(exported(tmp_path, make_samples(16), "lxmert"))
    lines = (out / "features.tsv").read_bytes().splitlines(keepends=True)
    fields = [line.rstrip(b"\n").split(b"\t") for line in lines]

    def changed(row, column, value):
        fields[row][column] = value
        return b"\t".join(fields[row]) + b"\n"

    lines[1] = changed(1, 9, fields[1][9][:-8])
    lines[2] = changed(2, 7, b"-3")
    lines[3] = changed(3, 8, b"!" * len(fields[3][8]))
    lines[4] = lines[4][:200] + b"\n"
    lines[5] = changed(5, 0, b"0")  # the first row's id
    lines[6] = changed(6, 3, base64.b64encode(np.full(int(fields[6][7]), 99)))
    lines[7] = b"\xff\xfe\t" + lines[7]
    lines[8] = changed(8, 7, b"9999999999")
    lines[9] = changed(9, 1, b"0")
    lines.insert(10, b"\n")
    (out / "features.tsv").write_bytes(b"".join(lines) + b"the last line is cut\t640")
    done = shards("import", "lxmert", out, "--out", tmp_path / "back", "--classes", names_file(tmp_path))
    assert done.returncode == 1
    assert "10 rows were refused, the first: 1: " in error_line(done)
    assert [(r["path"], r["reason"]) for r in rejects(tmp_path / "back")] == [
        ("1", "size"), ("2", "number"), ("3", "base64"), ("5", "columns"), ("0", "duplicate"), ("7", "class"),
        ("features.tsv:8", "columns"), ("9", "size"), ("10", "no-size"), ("the last line is cut", "columns"),
    ]  # fmt: skip
    assert len(list(read_samples(tmp_path / "back/shard-000000.tar"))) == 15 - 9
    assert shards("verify", tmp_path / "back").returncode == 0


def test_what_was_mended_is_read_by_the_same_command(tmp_path):
    out = exported(tmp_path, make_samples(30), "lxmert")
    whole = (out / "features.tsv").read_bytes()
    (out / "features.tsv").write_bytes(whole.replace(b"\t480\t640\t", b"\t48_\t640\t", 1))
    done = shards("import", "lxmert", out, "--out", tmp_path / "back")
    assert done.returncode == 1
    assert "1 rows were refused, the first: image-001: " in error_line(done)
    (out / "features.tsv").write_bytes(whole)
    imported("lxmert", out, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "shards")


def test_a_row_that_is_gone_from_an_export_is_refused_by_its_key(tmp_path):
    out = exported(tmp_path, make_samples(10), "bottom-up")
    lines = (out / "features.tsv").read_bytes().splitlines(keepends=True)
    (out / "features.tsv").write_bytes(b"".join(lines[:3] + lines[4:]))
    done = shards("import", "bottom-up", out, "--out", tmp_path / "back")
    assert done.returncode == 1
    assert "1 rows were refused, the first: image-003: not in the files" in error_line(done)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_float32_features_are_rounded_once(tmp_path, rng, dtype):
    (tmp_path / "f").mkdir()
    features = rng.normal(size=(3, P)).astype("f4")
    milvlg(tmp_path / "f/1.npz", rng, x=features)
    (got,) = imported("npz", tmp_path / "f", tmp_path / "back", "--dtype", dtype)
    error = np.abs(got.regions.features.astype("f4") - features)
    assert (error <= np.abs(features).max(1, keepdims=True) / (2048 if dtype == "float16" else 253)).all()


def test_any_number_of_processes_gives_the_same_bytes(tmp_path):
    out = bare(exported(tmp_path, make_samples(40), "oscar"))
    imported("oscar", out, tmp_path / "one", "--images-per-shard", 7, "--workers", 1)
    imported("oscar", out, tmp_path / "two", "--images-per-shard", 7, "--workers", 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_a_killed_import_goes_on_to_the_same_bytes(tmp_path):
    write_folder(tmp_path / "shards", [s for n in range(8) for s in renumbered(n)], per_shard=40)
    assert shards("export", "lxmert", tmp_path / "shards", "--out", tmp_path / "out").returncode == 0
    bare(tmp_path / "out")
    options = ("--images-per-shard", "8", "--classes", str(names_file(tmp_path)))
    imported("lxmert", tmp_path / "out", tmp_path / "whole", *options)
    line = [sys.executable, "-m", "oscar_shards", "import", "lxmert", tmp_path / "out", "--out", tmp_path / "back"]
    for count in (1, 9):
        process = subprocess.Popen([*map(str, line), *options, "--workers", "2"], text=True, stderr=subprocess.PIPE)
        until(partial(lambda n: len(list((tmp_path / "back").glob("shard*.tar"))) >= n, count), process)
        process.kill()
        process.wait()
        process.stderr.close()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "back").glob("shard*.tar")}
    assert 9 <= len(before) < 39
    imported("lxmert", tmp_path / "out", tmp_path / "back", *options)
    assert contents(tmp_path / "back") == contents(tmp_path / "whole")
    whole = [n for n in before if (tmp_path / "back" / n).stat().st_mtime_ns == before[n]]
    assert len(whole) >= 8  # what was whole is not written again


def renumbered(part):
    for sample in make_samples(40):
        image = dataclasses.replace(sample.image, id=f"{part}-{sample.image.id}")
        yield dataclasses.replace(sample, key=f"{part}-{sample.key}", image=image)


def test_a_folder_holds_the_shards_of_one_import(tmp_path):
    out = bare(exported(tmp_path, make_samples(20), "lxmert"))
    imported("lxmert", out, tmp_path / "back")
    before = contents(tmp_path / "back")
    for options in (("--source", "other"), ("--dtype", "int8"), ("--images-per-shard", 7)):
        done = shards("import", "lxmert", out, "--out", tmp_path / "back", *options)
        assert (done.returncode, "another job" in error_line(done)) == (2, True)
    imported("lxmert", out, tmp_path / "back")
    assert contents(tmp_path / "back") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "lxmert", "gone.tsv", "--out", "o"), "FROM gone.tsv: no such file"),
        (("import", "lxmert", "empty.tsv", "--out", "o"), "FROM empty.tsv: there is no image in it"),
        (("import", "npz", "empty", "--out", "o"), "no .npz file in it"),
        (("import", "oscar", "empty", "--out", "o"), "no corpus.yaml or features.tsv in it"),
        (("import", "lxmert", "out/features.tsv", "--out", "o"), "is of an export in the format bottom-up"),
        (("import", "lxmert", "plain/features.tsv", "--out", "o"), "none of the first 10 rows can be read"),
        (("import", "bottom-up", "out", "--out", "o", "--dtype", "int8"), "--dtype int8: out/images.parquet says"),
        (("import", "bottom-up", "plain", "--out", "shards"), "--out shards: the shards of another job are there"),
        (("import", "bottom-up", "plain", "--out", "plain"), "FROM is in it"),
        (("import", "bottom-up", "plain", "--out", "o", "--classes", "gone"), "--classes gone: no such file"),
        (("export", "oscar", "gone", "--out", "o"), "PATH gone: no such file or folder"),
        (("export", "oscar", "empty", "--out", "o"), "no manifest.json in empty"),
        (("export", "oscar", "shards", "--out", "plain"), "--out plain: not empty; give another --out, or --overwrite"),
        (("export", "oscar", "shards", "--out", "plain", "--overwrite"), "--overwrite: plain is no export"),
        (("export", "oscar", "shards", "--out", "."), "--out .: the shards are in it"),
        (("export", "oscar", "unfinished", "--out", "o"), "2 of 3 shards are there"),
    ],
)
def test_bad_arguments_get_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    out = exported(tmp_path, make_samples(11), "bottom-up")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/features.tsv").write_bytes((out / "features.tsv").read_bytes())
    (tmp_path / "empty.tsv").write_bytes(b"\n\n")
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "unfinished", make_samples(20))
    (tmp_path / "unfinished/shard-000001.tar").unlink()
    done = shards(*arguments)
    assert (done.returncode, message in error_line(done)) == (2, True), done.stderr
    assert not (tmp_path / "o").exists()
    assert (tmp_path / "plain/features.tsv").exists()


def test_an_export_is_replaced_only_when_asked_to(tmp_path):
    out = exported(tmp_path, make_samples(5), "npz")
    again = write_folder(tmp_path / "again", make_samples(3))
    assert shards("export", "lxmert", again, "--out", out).returncode == 2
    assert shards("export", "lxmert", again, "--out", out, "--overwrite").returncode == 0
    assert sorted(p.name for p in out.iterdir()) == ["features.tsv", "images.parquet", "manifest.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "out", "shards"]


@pytest.mark.parametrize("form", ["oscar", "lxmert", "bottom-up", "npz"])
def test_a_folder_with_anything_that_no_export_wrote_is_not_replaced(tmp_path, form):
    sources = ("coco", "cc")
    samples = [
        dataclasses.replace(sample, image=dataclasses.replace(sample.image, source=sources[n % 2]))
        for n, sample in enumerate(make_samples(6))
    ]
    out = exported(tmp_path, samples, form)
    for name in ("notes.txt", "mine/features.tsv", "coco/model.bin" if form == "oscar" else "9.npz"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        done = shards("export", form, tmp_path / "shards", "--out", out, "--overwrite")
        assert done.returncode == 2
        assert "is no export (" in error_line(done)
        assert " is in it)" in error_line(done)
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
        if name.startswith("mine"):
            (out / "mine").rmdir()
    assert shards("export", form, tmp_path / "shards", "--out", out, "--overwrite").returncode == 0


def test_a_table_of_images_of_somebody_else_is_no_export(tmp_path):
    folder = write_folder(tmp_path / "shards", make_samples(3))
    (tmp_path / "out").mkdir()
    pq.write_table(pa.table({"file": ["a.jpg"]}), tmp_path / "out" / "images.parquet")
    done = shards("export", "npz", folder, "--out", tmp_path / "out", "--overwrite")
    assert done.returncode == 2
    assert "is no export (no images.parquet of one in it)" in error_line(done)


def test_a_failed_export_leaves_nothing(tmp_path):
    folder = write_folder(tmp_path / "shards", make_samples(12))
    tar = folder / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    done = shards("export", "oscar", folder, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "see: oscar-shards verify" in error_line(done)
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]


def test_the_sidecar_is_what_the_docs_say(tmp_path):
    out = exported(tmp_path, make_samples(5), "lxmert")
    table = pq.read_table(out / "images.parquet")
    assert table.column_names == ["shard", "key", "json", "file", "id"]
    assert table["file"].to_pylist() == ["features.tsv"] * 4 + [""]  # image 4 has no regions
    assert json.loads(table["json"][0].as_py())["image"]["id"] == "0"
