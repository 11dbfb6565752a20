"""Export to Oscar's TSV: read by a literal re-creation of its reader, and by its own code where that is at hand."""

import dataclasses
import json
import os
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peers.oscar_tsv import TextLines, read_triples
from small_shards import P, make_samples, write_folder
from support import contents, error_line, rejects, shards

from oscar_common.sample import Text
from oscar_shards.read import read_samples

WIDTH = P + 6


def caption(text, id="0", source="c"):
    return Text(kind="caption", source=source, id=id, text=text)


def question(text, answer, id="q", source="q"):
    return Text(kind="qa", source=source, id=id, question=text, answer=answer)


def renamed(sample, source, id, texts=None, key=None):
    image = dataclasses.replace(sample.image, source=source, id=id)
    changed = {} if texts is None else {"texts": texts}
    return dataclasses.replace(sample, key=key or sample.key, image=image, **changed)


def odd_samples():
    """Images of many sources, with ids and texts that would break a naive file."""
    samples = make_samples(12)
    plain = [("coco", "000000391895"), ("cc", "7"), ("sbu", "7"), ("photos", "a_b|c\td.jpg"), ("photos", "none"),
             ("photos", "qa"), ("flickr30k", "36979"), ("gqa", "n161313"), ("photos", "000000391895"), ("", ""),
             ("coco", "größe/ü"), ("vqa", "%71a")]  # fmt: skip
    samples = [renamed(s, *ids) for s, ids in zip(samples, plain, strict=True)]
    samples[1] = renamed(
        samples[1], "cc", "7", [caption("tab\there\nand\r\nthere"), caption(" \t\n "), caption("Käfer 🐞")]
    )
    samples[2] = renamed(
        samples[2], "sbu", "7", [question("who?", ""), question("", "me"), question("what?", "a\tcat")]
    )
    samples[0] = renamed(
        samples[0], "coco", "000000391895", [question(f"q{n}?", "yes", id="same_id") for n in range(3)]
    )
    return samples


def expected_triples(samples):
    """(text_a, text_b, features, size) in the shards' order, without those that the reader would fail on."""
    for sample in samples:
        w, h = np.float32(sample.image.width), np.float32(sample.image.height)
        x1, y1, x2, y2 = sample.regions.boxes.T
        z = np.stack([x1 / w, y1 / h, x2 / w, y2 / h, (x2 - x1) / w, (y2 - y1) / h], 1)
        for text in sample.texts:
            a = " ".join((text.text or text.question or "").translate({9: " ", 10: " ", 13: " "}).split(" ")).strip()
            b = text.answer if text.kind == "qa" else " ".join(sample.regions.tags)
            if a and b:
                yield a, b, sample.regions.features.astype(np.float32), z, (sample.image.width, sample.image.height)


def export(folder, samples, dtype="float16"):
    write_folder(folder / "shards", samples, per_shard=5, dtype=dtype)
    done = shards("export", "oscar", folder / "shards", "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return done, folder / "out"


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_oscars_reader_gets_the_same_features_tags_and_texts(tmp_path, dtype):
    samples = [*odd_samples(), *make_samples(40)[12:]]
    done, out = export(tmp_path, samples, dtype)
    stored = [s for n in range(8) for s in read_samples(tmp_path / f"shards/shard-{n:06d}.tar")]
    read = read_triples(out / "corpus.yaml", out, WIDTH)
    want = list(expected_triples(stored))
    assert len(read) == len(want)
    for got, (a, b, features, z, size) in zip(read, want, strict=True):
        assert (got.text_a, got.text_b, (got.width, got.height)) == (a, b, size)
        np.testing.assert_array_equal(got.features[:, :P], features)
        np.testing.assert_allclose(got.features[:, P:], z, atol=1e-6)
    left_out = sum(len(s.texts) for s in samples) - len(want)
    assert f"{left_out} texts are not in corpus.tsv" in done.stdout


def test_ids_are_plain_unique_and_as_they_were_where_they_can_be(tmp_path):
    _, out = export(tmp_path, odd_samples())
    ids = {p.parent.relative_to(out).as_posix(): list(json.loads(p.read_text())) for p in out.rglob("imageid2idx.json")}
    assert ids["googlecc/0"] == ids["googlecc"] == ["7"]
    assert ids["sbu/0"] == ["7"]
    assert ids["flickr30k"] == ["36979"]
    assert ids["coco"][0] == "000000391895"
    assert ids["coco"] == ["000000391895", "a%5Fb%7Cc%09d.jpg", "none", "%71a", "photos%2F000000391895", "%",
                           "gr%C3%B6%C3%9Fe%2F%C3%BC", "%2571a"]  # fmt: skip


def test_retrievals_labels_lie_beside_the_features_in_the_same_order(tmp_path):
    samples = odd_samples()
    _, out = export(tmp_path, samples)
    labels, features = TextLines(out / "coco/predictions.tsv"), TextLines(out / "coco/features.tsv")
    assert [labels[n][0] for n in range(len(labels))] == [features[n][0] for n in range(len(features))]
    said = json.loads(labels[0][1])
    regions = samples[0].regions
    assert [o["class"] for o in said["objects"]] == regions.tags
    assert [o["conf"] for o in said["objects"]] == regions.scores
    np.testing.assert_array_equal(np.float32([o["rect"] for o in said["objects"]]), regions.boxes)
    assert all(p.read_bytes().isascii() for p in out.rglob("*.json"))
    assert all(p.read_bytes().isascii() for p in out.rglob("predictions*.tsv"))


class Words:
    """As much of a tokenizer as the reader uses."""

    def __init__(self):
        self.vocab = {"[UNK]": 0, "[MASK]": 1}

    def tokenize(self, text):
        return text.split()

    def convert_tokens_to_ids(self, tokens):
        return [0 for _ in tokens]


@pytest.fixture
def real_oscar(monkeypatch):
    repo = os.environ.get("OSCAR_REPO")
    if not repo:
        pytest.skip("OSCAR_REPO names no checkout of microsoft/Oscar")
    monkeypatch.syspath_prepend(repo)
    load = yaml.load  # of which PyYAML 6 wants a Loader, which that code does not name
    monkeypatch.setattr(yaml, "load", lambda stream, Loader=yaml.SafeLoader: load(stream, Loader))
    for name in ("transformers.pytorch_transformers", "oscar.modeling.modeling_bert"):
        stub = types.ModuleType(name)
        stub.__getattr__ = lambda attribute: type(attribute, (), {})
        monkeypatch.setitem(sys.modules, name, stub)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
def test_the_real_oscar_tsv_dataset_reads_an_export(tmp_path, real_oscar, monkeypatch):
    from oscar.datasets.oscar_tsv import OscarTSVDataset

    samples = [*odd_samples(), *make_samples(40)[12:]]
    export(tmp_path, samples)
    monkeypatch.chdir(tmp_path)
    args = types.SimpleNamespace(
        data_dir="out", chunk_start_id=-1, chunk_end_id=-1, use_gtlabels=False, img_feature_dim=WIDTH, use_b=True,
        texta_false_prob=0.25, max_img_seq_length=50, num_contrast_classes=3, textb_sample_mode=1,
        mask_loss_for_unmatched=True,
    )  # fmt: skip
    data = OscarTSVDataset("out/corpus.yaml", args, Words(), seq_len=35)
    want = list(expected_triples(samples))
    assert len(data) == len(want)
    for n, (a, b, features, _, size) in enumerate(want):
        image, text_a, text_b = data.get_corpus_line(n)
        assert (text_a, text_b) == (a, b)
        np.testing.assert_array_equal(data.get_img_feature(image).numpy()[:, :P], features)
        assert data.get_img_info(n) == {"width": size[0], "height": size[1]}
    random.seed(1)
    for n in range(len(want)):
        features, (ids, *_), item = data[n]
        assert features.shape == (50, WIDTH)
        assert (len(ids), item) == (35, n)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
def test_the_real_retrieval_dataset_reads_an_export(tmp_path, real_oscar):
    from oscar.run_retrieval import RetrievalDataset

    samples = [renamed(s, "coco", f"{n + 100}") for n, s in enumerate(make_samples(4))]  # all have regions
    _, out = export(tmp_path, samples)
    torch.save({n + 100: ["a cat"] for n in range(4)}, tmp_path / "train_captions.pt")
    args = types.SimpleNamespace(
        img_feat_file=str(out / "coco/features.tsv"), data_dir=str(tmp_path), add_od_labels=True,
        num_captions_per_img_train=1, max_seq_length=35, max_img_seq_length=50, output_mode="classification",
    )  # fmt: skip
    data = RetrievalDataset(Words(), args)
    for n, sample in enumerate(samples):
        assert data.get_od_labels(n + 100) == " ".join(sample.regions.tags)
        np.testing.assert_array_equal(data.get_image(n + 100).numpy()[:, :P], sample.regions.features.astype("f4"))
        np.testing.assert_array_equal(data.labels[n + 100]["boxes"], sample.regions.boxes)


def bare(out: Path) -> Path:
    """An export as released files are: without what only this project writes."""
    (out / "images.parquet").unlink()
    (out / "manifest.json").unlink()
    return out


def test_released_files_are_read_without_anything_of_ours(tmp_path):
    samples = [renamed(s, "coco" if n % 2 else "cc", f"{n}") for n, s in enumerate(make_samples(20))]
    _, out = export(tmp_path, samples)
    bare(out)
    done = shards("import", "oscar", out / "corpus.yaml", "--out", tmp_path / "back", "--images-per-shard", 100)
    assert done.returncode == 0, done.stderr
    back = {s.image.id: s for s in read_samples(tmp_path / "back/shard-000000.tar")}
    assert len(back) == 20
    for sample in samples:
        got = back[sample.image.id]
        source = "coco" if sample.image.source == "coco" else "googlecc"
        assert (got.image.source, got.key) == (source, f"{source}%2F{sample.image.id}")
        assert (got.image.width, got.image.height) == (sample.image.width, sample.image.height)
        assert (got.regions.tags, got.regions.scores) == (sample.regions.tags, sample.regions.scores)
        np.testing.assert_array_equal(got.regions.boxes, sample.regions.boxes)
        np.testing.assert_array_equal(got.regions.features, sample.regions.features)
        kept = [t for t in sample.texts if t.kind == "qa" or sample.regions.tags]
        assert [(t.kind, t.text, t.question, t.answer) for t in got.texts] == [
            (t.kind, t.text, t.question, t.answer) for t in kept
        ]
        assert all(t.source == source for t in got.texts)


def test_ground_truth_is_where_oscars_trainer_looks_for_it_and_comes_back(tmp_path):
    truth = [["traffic light", "größe", "cat", "cat"] if n % 2 else [] for n in range(6)]
    samples = [renamed(s, "coco", f"{n}") for n, s in enumerate(make_samples(6))]
    samples = [dataclasses.replace(s, gt_tags=tags) for s, tags in zip(samples, truth, strict=True)]
    _, out = export(tmp_path, samples)
    for name in ("predictions_gt.tsv", "predictions.tsv"):
        labels = TextLines(out / "coco" / name)
        said = [json.loads(labels[n][1]) for n in range(6)]
        assert ["gt_objects" in one for one in said] == [bool(tags) for tags in truth]
        assert " ".join(one["class"] for one in said[1]["gt_objects"]) == "traffic light größe cat cat"
    bare(out)
    assert shards("import", "oscar", out / "corpus.yaml", "--out", tmp_path / "back").returncode == 0
    back = list(read_samples(tmp_path / "back/shard-000000.tar"))
    assert [s.gt_tags for s in back] == truth
    assert [s.regions.tags for s in back] == [s.regions.tags for s in samples]


@pytest.mark.parametrize(
    ("gt_objects", "read"),
    [([{"class": "ski", "rect": [0, 0, 1, 1]}, {"rect": [1]}, {"class": ""}], ["ski"]), ([], []),
     ({"class": "ski"}, "no list of gt_objects"), (["ski"], "no list of gt_objects"), (None, "no list of gt_objects"),
     ([{"class": 5}], "the class of one of gt_objects is no text")],
)  # fmt: skip
def test_what_others_say_of_the_ground_truth_is_read_or_its_row_refused(tmp_path, gt_objects, read):
    samples = [renamed(s, "coco", f"{n}") for n, s in enumerate(make_samples(3))]
    _, out = export(tmp_path, samples)
    bare(out)
    rows = [line.split("\t") for line in (out / "coco/predictions.tsv").read_text().splitlines()]
    rows[1][1] = json.dumps(json.loads(rows[1][1]) | {"gt_objects": gt_objects})
    for name in ("predictions_gt.tsv", "predictions.tsv"):
        (out / "coco" / name).write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    done = shards("import", "oscar", out / "coco", "--out", tmp_path / "back")
    found = {s.image.id: s.gt_tags for s in read_samples(tmp_path / "back/shard-000000.tar")}
    if isinstance(read, str):
        assert done.returncode == 1
        assert read in error_line(done)
        assert found == {"0": [], "2": []}
    else:
        assert done.returncode == 0, done.stderr
        assert found == {"0": [], "1": read, "2": []}


def test_a_features_file_alone_is_read_with_the_tags_beside_it(tmp_path):
    samples = [renamed(s, "coco", f"{n}") for n, s in enumerate(make_samples(9))]
    _, out = export(tmp_path, samples)
    bare(out)
    (out / "coco/predictions_gt.tsv").unlink()
    for number, given in enumerate((out / "coco/features.tsv", out / "coco")):
        done = shards("import", "oscar", given, "--out", tmp_path / f"back{number}")
        assert done.returncode == 0, done.stderr
        back = list(read_samples(tmp_path / f"back{number}/shard-000000.tar"))
        assert [s.key for s in back] == [f"coco%2F{n}" for n in range(9)]
        assert [s.regions.tags for s in back] == [s.regions.tags for s in samples]
        assert not any(s.texts for s in back)


def test_the_captioning_variant_with_json_rows_is_read(tmp_path):
    samples = [renamed(s, "coco", f"{n}") for n, s in enumerate(make_samples(4))]
    _, out = export(tmp_path, samples)
    bare(out)
    lines = (out / "coco/features.tsv").read_bytes().splitlines()
    rows = [line.split(b"\t") for line in lines]
    told = [(r[0].decode(), json.dumps({"num_boxes": int(r[1]), "features": r[2].decode()})) for r in rows]
    (out / "coco/features.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in told))
    done = shards("import", "oscar", out / "coco", "--out", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    for got, want in zip(read_samples(tmp_path / "back/shard-000000.tar"), samples, strict=True):
        np.testing.assert_array_equal(got.regions.features, want.regions.features)


def test_boxes_come_from_the_positions_where_labels_have_others(tmp_path):
    samples = [renamed(s, "coco", f"{n}") for n, s in enumerate(make_samples(3))]
    _, out = export(tmp_path, samples)
    bare(out)
    said = [json.dumps({"image_w": s.image.width, "image_h": s.image.height, "objects": []}) for s in samples]
    (out / "coco/predictions.tsv").write_text("".join(f"{n}\t{one}\n" for n, one in enumerate(said)))
    (out / "coco/predictions_gt.tsv").unlink()
    assert shards("import", "oscar", out / "coco", "--out", tmp_path / "back").returncode == 0
    for got, want in zip(read_samples(tmp_path / "back/shard-000000.tar"), samples, strict=True):
        np.testing.assert_allclose(got.regions.boxes, want.regions.boxes, atol=1e-3)
        assert got.regions.tags == []


def test_rows_of_an_unknown_size_are_refused_with_that_reason(tmp_path):
    samples = [renamed(s, "coco", f"{n}") for n, s in enumerate(make_samples(3))]
    _, out = export(tmp_path, samples)
    bare(out)
    for path in (out / "coco").glob("predictions*"):
        path.unlink()
    done = shards("import", "oscar", out / "coco", "--out", tmp_path / "back")
    assert done.returncode == 2
    assert "nothing says how large the image is" in error_line(done)


def test_damaged_rows_of_a_corpus_are_named_and_the_rest_is_read(tmp_path):
    samples = [renamed(s, "coco", f"{n}") for n, s in enumerate(make_samples(8))]
    _, out = export(tmp_path, samples)
    bare(out)
    with (out / "corpus.tsv").open("ab") as file:
        file.write(b"coco_99\tcoco_99\tno such image\ncoco_1\tcoco_1\t  \ncoco_1\tcoco_qa_1_zz\twho?\njunk\n")
        file.write(b"coco_1\tcoco_1\t\xff\xfe\ncoco_1\tcoco_2\tof two images\n")
    done = shards("import", "oscar", out / "corpus.yaml", "--out", tmp_path / "back")
    assert done.returncode == 1
    assert "6 rows were refused, the first: corpus.tsv:" in error_line(done)
    assert sorted(r["message"] for r in rejects(tmp_path / "back")) == [
        "coco_1: image and label are of two images", "coco_1: no answer 'zz' in QA_fileB.tsv",
        "coco_99: no features of image '99'", "corpus: not UTF-8", "corpus: the text is empty",
        "junk: not three fields: image, label, text",
    ]  # fmt: skip
    assert len(list(read_samples(tmp_path / "back/shard-000000.tar"))) == 8


def test_a_stale_lineidx_is_not_believed(tmp_path):
    samples = [renamed(s, "coco", f"{n}") for n, s in enumerate(make_samples(8))]
    _, out = export(tmp_path, samples)
    bare(out)
    assert shards("import", "oscar", out / "coco", "--out", tmp_path / "a").returncode == 0
    index = (out / "coco/features.lineidx").read_text().split()
    for number, stale in enumerate((index[:-1], [*index[:2], "7000", *index[3:]], ["junk"], [])):
        (out / "coco/features.lineidx").write_text("\n".join(stale))
        assert shards("import", "oscar", out / "coco", "--out", tmp_path / f"b{number}").returncode == 0
        assert contents(tmp_path / f"b{number}") == contents(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [("corpus: nowhere\nimage_feature_path: {coco: coco}\n", "'nowhere'"), ("- 1", "no key `corpus`"), ("{", "YAML"),
     ("corpus: coco\nimage_feature_path: {coco: gone}\n", "no features.tsv in"),
     ("corpus: coco\nimage_feature_path: {coco: coco}\ncorpus_file: gone.tsv\n", "'gone.tsv'")],
)  # fmt: skip
def test_what_a_yaml_lacks_is_named(tmp_path, content, message):
    _, out = export(tmp_path, make_samples(3))
    bare(out)
    (out / "corpus.yaml").write_text(content)
    done = shards("import", "oscar", out / "corpus.yaml", "--out", tmp_path / "back")
    assert done.returncode == 2
    assert message in error_line(done)
    assert not list((tmp_path).glob("back/*.tar"))
