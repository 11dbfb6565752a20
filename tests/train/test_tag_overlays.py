"""Ground-truth tags of an instances file reach the corpus, in the file's order, and the shards stay as they are."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from small_shards import make_samples, write_folder
from support import run_here

from oscar_shards.__main__ import command
from oscar_train.data.corpus import open_corpus
from oscar_train.data.sources import open_source
from oscar_train.data.texts.phrases import CAPTION
from oscar_train.data.texts.tags import TagRule
from oscar_train.data.texts.tokens import Tokenizer

NAMES = {3: "cat", 7: "traffic light", 90: "ski"}


def write_instances(path: Path, files: list[str], annotations: list[tuple[int, int]]) -> Path:
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(files)],
        "annotations": [{"image_id": image, "category_id": category} for image, category in annotations],
        "categories": [{"id": number, "name": name} for number, name in NAMES.items()],
    }
    path.write_text(json.dumps(content))
    return path


def tags(*arguments: object) -> Any:
    return run_here(command, "tags", *arguments)


def test_the_tags_are_those_of_the_file_in_its_order_with_duplicates(tokenizer: Tokenizer, tmp_path: Path):
    samples = make_samples(8)
    folder = write_folder(tmp_path / "s", samples, per_shard=3)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    files = [sample.image.path for sample in samples[:5]]
    file = write_instances(tmp_path / "i.json", files, [(4, 90), (1, 3), (4, 3), (1, 7), (4, 90), (1, 3)])

    out = tmp_path / "truth.parquet"
    done = tags(folder, "--ground-truth", file, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "6 tags for 2 of 8 images" in done.stdout
    wanted = {1: ["cat", "traffic light", "cat"], 4: ["ski", "cat", "ski"]}
    assert pq.read_table(out).to_pylist() == [{"key": samples[n].key, "gt_tags": wanted[n]} for n in wanted]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    sources = [open_source(str(folder), False)]
    rule = TagRule(which="ground-truth")
    corpus = open_corpus(sources, tokenizer, tmp_path, [out], tags=rule)
    plain = open_corpus(sources, tokenizer, tmp_path, tags=rule)
    assert (corpus.ground_truth, plain.ground_truth) == (2, 0)
    for triple in range(len(corpus.kind)):
        image = int(corpus.image[triple])
        seen = tokenizer.backend.decode(corpus.second[corpus.second_row[triple]])
        if corpus.kind[triple] == CAPTION and image in wanted:
            assert seen == " ".join(wanted[image])
        else:
            assert seen == tokenizer.backend.decode(plain.second[plain.second_row[triple]])


@pytest.mark.parametrize(
    ("files", "annotations", "message"),
    [
        (["gone.jpg"], [(0, 3)], "none of its 1 annotated images is in"),
        (["a.jpg"], [(5, 3)], "image_id 5, which is not in `images`"),
        (["a.jpg"], [(0, 4)], "category_id 4, which is not in `categories`"),
        (None, [], "not COCO instances; needed are the lists images, annotations, categories"),
    ],
)
def test_what_is_no_ground_truth_of_these_images_is_refused_in_one_line(
    shards: Path, tmp_path: Path, files: list[str] | None, annotations: list[tuple[int, int]], message: str
):
    path = tmp_path / "i.json"
    if files is None:
        path.write_text("[]")
    else:
        write_instances(path, files, annotations)
    done = tags(shards, "--ground-truth", path, "--out", tmp_path / "o.parquet")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o.parquet").exists()
