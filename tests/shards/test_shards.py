"""The contract: plain tars that stock webdataset reads, and an index that agrees with them byte for byte."""

import dataclasses
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import webdataset
import xxhash
from support import run_here

from oscar_common.errors import UsageError
from oscar_common.sample import Attribute, ImageRecord, Regions, Sample, Text, make_key
from oscar_shards.__main__ import command as oscar_shards
from oscar_shards.index import FIRST_SCHEMA, SCHEMA, index_path, index_tar, load_index, open_index, write_index
from oscar_shards.manifest import DetectorRecord, Layout, Manifest, PlanRecord, write_manifest
from oscar_shards.read import open_folder, read_boxes, read_features, read_index, read_rejects, read_samples
from oscar_shards.reindex import reindex
from oscar_shards.stats import count
from oscar_shards.verify import check
from oscar_shards.write import Reject, shard_path, write_shard

P = 16
LAYOUT = Layout(feature_dim=P)


def make_sample(rng, number: int) -> Sample:
    k = 3 + number
    return Sample(
        key=make_key(f"dir/{number}.x"),
        image=ImageRecord(
            source="test", id=f"dir/{number}.x", path=f"dir/{number}.x.jpg", width=640, height=480, sha256="ab" * 32
        ),
        regions=Regions(
            boxes=rng.uniform(0, 480, (k, 4)).astype(np.float32),
            features=rng.normal(size=(k, P)).astype(np.float16),
            tags=["cat", "dog", "cat", "hair drier"][:k] + ["tree"] * (k - 4),
            scores=rng.uniform(size=k).round(6).tolist(),
            attributes=[[Attribute(id=3, name="red", score=0.5)]] * k,
        ),
        texts=[
            Text(kind="caption", source="c", id="1", text="Ein Käfer."),
            Text(kind="qa", source="q", id="2", question="what?", answer="a cat"),
        ],
    )


@pytest.fixture
def folder(tmp_path, rng):
    """Two shards of four samples; the second has a reject."""
    samples = [make_sample(rng, n) for n in range(8)]
    write_shard(shard_path(tmp_path, "s", 0), samples[:4], LAYOUT)
    write_shard(
        shard_path(tmp_path, "s", 1), [Reject(path="x.jpg", reason="truncated", message="cut"), *samples[4:]], LAYOUT
    )
    detector = DetectorRecord(
        name="d", preset="detectron2", config="A: 1", weights="w", weights_sha256="0", classes=["cat"], feature_dim=P
    )
    plan = PlanRecord(
        images="i", captions=None, num_images=9, num_texts=16, images_per_shard=5, num_shards=2, sha256="1"
    )
    write_manifest(tmp_path, Manifest(name="s", detector=detector, settings={"min_boxes": 1}, plan=plan))
    return tmp_path, samples


def test_stock_webdataset_reads_every_sample(folder):
    path, samples = folder
    urls = sorted(str(p) for p in path.glob("*.tar"))
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [r["__key__"] for r in read] == [s.key for s in samples]
    for got, want in zip(read, samples, strict=True):
        assert got["json"]["image"] == dataclasses.asdict(want.image)
        assert got["json"]["tags"] == want.regions.tags
        assert got["json"]["scores"] == want.regions.scores
        assert got["json"]["texts"][1] == {
            "kind": "qa",
            "source": "q",
            "id": "2",
            "question": "what?",
            "answer": "a cat",
        }
        np.testing.assert_array_equal(got["boxes.npy"], want.regions.boxes, strict=True)
        np.testing.assert_array_equal(got["features.npy"], want.regions.features, strict=True)


def test_members_come_in_the_contracts_order_without_pax_headers(folder):
    path, samples = folder
    with tarfile.open(path / "s-000000.tar") as archive:
        members = archive.getmembers()
        assert [m.name for m in members[:3]] == [f"{samples[0].key}.{e}" for e in ("json", "boxes.npy", "features.npy")]
        assert all(m.mtime == 0 and not m.pax_headers for m in members)
        assert len(members) == 12


def test_the_index_agrees_with_the_tar_byte_for_byte(folder):
    path, samples = folder
    for row, sample in zip(open_folder(path).table.to_pylist(), samples, strict=True):
        raw = (path / f"s-{row['shard']:06d}.tar").read_bytes()
        for name, array in (("boxes", sample.regions.boxes), ("features", sample.regions.features)):
            piece = raw[row[f"{name}_offset"] : row[f"{name}_offset"] + row[f"{name}_bytes"]]
            assert piece == array.tobytes()
            assert xxhash.xxh3_64_intdigest(piece) == row[f"{name}_xxh3"]
        assert row["attributes"] == [[{"id": 3, "name": "red", "score": 0.5}]] * row["num_boxes"]


def test_arrays_are_read_at_their_offsets(folder):
    path, samples = folder
    opened = open_folder(path)
    for row, sample in zip(opened.table.to_pylist(), samples, strict=True):
        np.testing.assert_array_equal(read_boxes(opened.tars[row["shard"]], row), sample.regions.boxes)
        np.testing.assert_array_equal(read_features(opened.tars[row["shard"]], row), sample.regions.features)


def test_pyarrow_reads_the_indexes_as_one_table(folder):
    path, samples = folder
    files = [str(p) for p in sorted(path.glob("s-??????.parquet"))]
    assert ds.dataset(files).to_table().column("key").to_pylist() == [s.key for s in samples]


def test_ground_truth_is_in_the_json_and_the_index_of_the_images_that_have_some(tmp_path, rng):
    samples = [make_sample(rng, n) for n in range(3)]
    write_shard(shard_path(tmp_path, "plain", 0), samples, LAYOUT)
    samples[1] = dataclasses.replace(samples[1], gt_tags=["Käfer", "ski", "ski"])
    tar = shard_path(tmp_path, "s", 0)
    write_shard(tar, samples, LAYOUT)
    usual = ["image", "tags", "scores", "attributes", "texts"]
    said = [r["json"] for r in webdataset.WebDataset(str(tar), shardshuffle=False).decode()]
    assert [list(s) for s in said] == [usual, [*usual[:4], "gt_tags", "texts"], usual]
    assert [s.gt_tags for s in read_samples(tar)] == [[], ["Käfer", "ski", "ski"], []]
    assert load_index(tar)["gt_tags"].to_pylist() == [[], ["Käfer", "ski", "ski"], []]
    rows, plain = load_index(tar), load_index(shard_path(tmp_path, "plain", 0))
    assert rows["frame_xxh3"][0] == plain["frame_xxh3"][0]  # the others' bytes are as they would be without


def test_an_index_from_before_the_ground_truth_is_read_by_all_that_read_indexes(folder):
    path, _ = folder
    newer = {tar: load_index(tar) for tar in sorted(path.glob("*.tar"))}
    faults = {(tar, quick): check(tar, quick).faults for tar in newer for quick in (False, True)}
    older, _ = newer  # the other stays as it is
    write_index(newer[older].drop_columns(["gt_tags"]), index_path(older))
    assert pq.read_schema(index_path(older)).equals(FIRST_SCHEMA)
    for tar, table in newer.items():
        assert load_index(tar).equals(table)
        assert load_index(tar).schema.metadata == table.schema.metadata
        for file in (index_path(tar), pa.py_buffer(index_path(tar).read_bytes())):
            tar_bytes, rows = open_index(file, tar)
            assert tar_bytes == tar.stat().st_size
            assert pa.Table.from_batches(rows).equals(table)
        for quick in (False, True):
            assert check(tar, quick).faults == faults[tar, quick]
        assert read_index(tar).equals(table)
    assert open_folder(path).table["gt_tags"].to_pylist() == [[]] * 8
    assert count(list(newer)).images == 8
    for command, *options in (("stats",), ("stats", "--html", path / "a.html"), ("show", "--html", path / "b.html")):
        done = run_here(oscar_shards, command, path, *options)
        assert done.returncode == 0, done.stderr
    reindex([path], None, 1)
    assert all(pq.read_schema(index_path(tar)).equals(SCHEMA) for tar in newer)


def test_the_index_can_be_made_again_from_the_tar(folder):
    path, _ = folder
    again = index_tar(path / "s-000001.tar")
    assert again.equals(
        open_folder(path).table.slice(4).drop_columns("shard").replace_schema_metadata(again.schema.metadata)
    )


def test_the_same_samples_give_the_same_bytes(folder, tmp_path_factory):
    path, samples = folder
    other = shard_path(tmp_path_factory.mktemp("other"), "s", 0)
    write_shard(other, samples[:4], LAYOUT)
    assert other.read_bytes() == (path / "s-000000.tar").read_bytes()
    assert index_path(other).read_bytes() == (path / "s-000000.parquet").read_bytes()


def test_rejects_lie_beside_their_shard_only(folder):
    path, _ = folder
    assert [p.name for p in path.glob("*.rejects.parquet")] == ["s-000001.rejects.parquet"]
    assert read_rejects(open_folder(path).tars).to_pylist() == [
        {"path": "x.jpg", "reason": "truncated", "message": "cut"}
    ]


def test_a_failure_leaves_nothing_under_a_final_name(tmp_path, rng):
    def failing():
        yield make_sample(rng, 0)
        raise RuntimeError("the detector died")

    with pytest.raises(RuntimeError):
        write_shard(shard_path(tmp_path, "s", 0), failing(), LAYOUT)
    assert list(tmp_path.iterdir()) == []


def test_a_sample_of_another_size_is_refused(tmp_path, rng):
    with pytest.raises(ValueError, match=r"features are float16 \(3, 16\), not float16 \(3, 17\)"):
        write_shard(shard_path(tmp_path, "s", 0), [make_sample(rng, 0)], Layout(feature_dim=P + 1))


def test_statistics(folder):
    stats = count(open_folder(folder[0]).tars)
    assert (stats.images, stats.regions, stats.regions_min, stats.regions_max) == (8, sum(range(3, 11)), 3, 10)
    assert stats.triples == {"c, caption": 8, "q, qa": 8}
    assert stats.rejects == {"truncated": 1}
    assert stats.tags["cat"] == 16
    assert stats.images_without_text == 0


def elsewhere(folder: Path) -> str:
    return (folder / "manifest.json").read_text().replace('"name": "s"', '"name": "../x"')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "s-000001.tar").write_bytes((p / "s-000001.tar").read_bytes()[:-1024]), "s-000001.tar has"),
        (lambda p: (p / "s-000001.tar").unlink(), "1 of 2 shards are there"),
        (lambda p: (p / "s-000000.parquet").unlink(), "has no index s-000000.parquet"),
        (lambda p: (p / "s-000000.parquet").write_bytes(b"PAR1"), "s-000000.parquet is damaged"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json in it"),
        (lambda p: (p / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "manifest.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda p: (p / "manifest.json").write_text(elsewhere(p)), "name '../x'; allowed are letters, digits, - and _"),
        (lambda p: (p / "manifest.json").write_text('{"format_version": 9}'), "format_version 9"),
    ],
)
def test_damage_is_named_in_one_line(folder, damage, message):
    damage(folder[0])
    with pytest.raises(UsageError) as error:
        open_folder(folder[0])
    assert message in error.value.message
    assert "\n" not in error.value.message
