"""Images are found and texts are joined to them, whatever form they come in."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oscar_common.errors import UsageError
from oscar_common.settings import Catalog, Extract
from oscar_extract.plan import Plan, plan_of, planned_images
from oscar_extract.sources.inventory import readable
from oscar_extract.sources.request import make_request


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def make_plan(folder: Path, captions: object = None, **settings: object) -> Plan:
    asked = Extract(images=str(folder), captions=captions and str(captions), **settings)
    return plan_of(make_request(asked, Catalog()), asked)


def ids(folder: Path) -> dict[str, str]:
    return {i.path: i.id for i in planned_images(make_plan(folder).table)}


def texts_of(plan: Plan) -> dict[str, list[str]]:
    return {i.id: [t.text for t in i.texts] for i in planned_images(plan.table) if i.texts}


def unmatched(plan: Plan) -> int:
    return plan.left_out["reason"].to_pylist().count("text-without-image")


def test_images_are_found_recursively_and_other_files_left_alone(tmp_path):
    touch(tmp_path, "b/2.JPG", "a.webp", "notes.md", ".hidden.jpg", ".git/x.png", "noextension", "a.txt")
    assert ids(tmp_path) == {"a.webp": "a", "b/2.JPG": "b/2", "noextension": "noextension"}


def test_a_name_that_is_no_utf8_can_be_stored(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
        pass
    (image,) = planned_images(make_plan(tmp_path).table)
    assert image.id == image.path.removesuffix(".jpg") == "caf\\xe9"
    assert image.path == readable(os.fsdecode(image.raw))
    assert (tmp_path / os.fsdecode(image.raw)).exists()


def test_ids_never_collide(tmp_path):
    touch(tmp_path, "a.jpg", "a.png", "a.jpg.png", "b.c.jpg", "b.d.jpg", "ü é.jpg", "e", "e.jpg")
    assert ids(tmp_path) == {
        "a.jpg": "a.jpg", "a.png": "a.png", "a.jpg.png": "a.jpg.png",
        "b.c.jpg": "b.c", "b.d.jpg": "b.d", "ü é.jpg": "ü é", "e": "e", "e.jpg": "e.jpg",
    }  # fmt: skip


def test_a_file_reached_twice_counts_once_and_circles_end(tmp_path):
    touch(tmp_path, "a/x.jpg")
    (tmp_path / "a/again").symlink_to(tmp_path)
    (tmp_path / "b.jpg").symlink_to(tmp_path / "a/x.jpg")
    assert len(ids(tmp_path)) == 1


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return touch(tmp_path / "images", "d/cat.1.jpg", "000000000139.jpg", "e/x.jpg")


COCO = {
    "images": [
        {"id": 7, "file_name": "cat.1.jpg"},
        {"id": 139, "file_name": "000000000139.jpg"},
        {"id": 1, "file_name": "gone.jpg"},
    ],
    "annotations": [
        {"id": 10, "image_id": 7, "caption": "A cat."},
        {"id": 11, "image_id": 7, "caption": " Another cat.\n"},
        {"id": 12, "image_id": 139, "caption": "A room."},
        {"id": 13, "image_id": 1, "caption": "Gone."},
    ],
}
ROWS = [("d/cat.1.jpg", "A cat."), ("cat.1", "Another cat."), ("000000000139.jpg", "A room."), ("gone.jpg", "Gone.")]


def write(path: Path) -> None:
    columns = {"image": [r[0] for r in ROWS], "caption": [r[1] for r in ROWS]}
    if path.suffix == ".json":
        path.write_text(json.dumps(COCO))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"file_name": i, "text": t}) for i, t in ROWS))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.stem == "headless":
        path.write_text("\n".join(f"{i}\t{t}" for i, t in ROWS))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        path.write_text(
            f"id{mark}image{mark}caption\n" + "".join(f"{n}{mark}{i}{mark}{t}\n" for n, (i, t) in enumerate(ROWS))
        )


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c.parquet", "c.tsv", "c.csv", "headless.tsv"])
def test_every_form_gives_the_same_texts(tmp_path, images, name):
    write(tmp_path / name)
    plan = make_plan(images, tmp_path / name)
    assert texts_of(plan) == {"d/cat.1": ["A cat.", "Another cat."], "000000000139": ["A room."]}
    assert unmatched(plan) == 1
    texts = [t for i in planned_images(plan.table) for t in i.texts]
    assert {(t.kind, t.source) for t in texts} == {("caption", Path(name).stem)}


def test_questions_with_answers(tmp_path, images):
    rows = [{"image": "e/x.jpg", "question": "Is it?", "answer": "yes"}, {"image": "e/x.jpg", "caption": "It is."}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (image,) = [i for i in planned_images(make_plan(images, tmp_path / "c.jsonl").table) if i.texts]
    assert [(t.kind, t.question, t.answer, t.text) for t in image.texts] == [
        ("qa", "Is it?", "yes", None),
        ("caption", None, None, "It is."),
    ]


def test_txt_files_beside_the_images(tmp_path):
    folder = touch(tmp_path, "a/x.jpg", "y.jpg")
    (folder / "a/x.txt").write_text("First.\n\nSecond.\n")
    for captions in ("txt", folder):
        assert texts_of(make_plan(folder, captions)) == {"a/x": ["First.", "Second."]}


def test_coco_numbers_name_files_with_leading_zeros(tmp_path, images):
    (tmp_path / "c.csv").write_text("image_id,caption\n139,A room.\n1,Nothing.\n")
    assert list(texts_of(make_plan(images, tmp_path / "c.csv"))) == ["000000000139"]


def test_a_lone_quotation_mark_in_a_tsv_swallows_nothing(tmp_path, images):
    (tmp_path / "c.tsv").write_text('image\tcaption\ncat.1.jpg\t"Hi, he said\n000000000139.jpg\tA room.\n')
    assert len(texts_of(make_plan(images, tmp_path / "c.tsv"))) == 2


def test_half_a_surrogate_pair_costs_a_question_mark_not_the_job(tmp_path, images):
    (tmp_path / "c.jsonl").write_text('{"image": "e/x.jpg", "text": "A \\ud83d face."}')
    assert texts_of(make_plan(images, tmp_path / "c.jsonl")) == {"e/x": ["A ? face."]}


def test_an_ambiguous_name_names_no_image(tmp_path):
    folder = touch(tmp_path / "images", "a/x.jpg", "b/x.jpg")
    (tmp_path / "c.tsv").write_text("image\tcaption\nx.jpg\tWhich?\nb/x.jpg\tThis one.\n")
    plan = make_plan(folder, tmp_path / "c.tsv")
    assert list(texts_of(plan)) == ["b/x"]
    assert unmatched(plan) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", '{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}', "no `caption`"),
        ("c.json", '{"a": 1}', "not COCO captions"),
        ("c.json", "{", "cannot be read as .json"),
        ("c.json", "[" * 100_000, "cannot be read as .json"),
        ("c.jsonl", '{"url": "u", "caption": "c"}', "row 0 has the columns url, caption"),
        ("c.csv", "a,b,c\n1,2,3\n", "row 0 has the columns a, b, c"),
        ("c.parquet", "PAR1", "cannot be read as .parquet"),
        ("c.tsv", "other.jpg\tx\n", "none of its 1 texts names an image"),
        ("c.tsv", "", "none of its 0 texts names an image"),
        ("c.xml", "", "unknown form '.xml'; allowed: .csv .json .jsonl .parquet .tsv, or txt"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(tmp_path, images, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as error:
        make_plan(images, tmp_path / name)
    assert message in error.value.message
    assert name in error.value.message
    assert "\n" not in error.value.message


def test_the_plan_is_a_function_of_the_folder_and_the_texts(tmp_path):
    folder = touch(tmp_path / "images", "b.jpg", "a.jpg", "c.jpg")
    (tmp_path / "c.tsv").write_text("a.jpg\tA.\n")
    plan = make_plan(folder, tmp_path / "c.tsv", images_per_shard=2)
    assert plan.table["id"].to_pylist() == ["a", "b", "c"]
    assert (plan.record.num_shards, plan.record.images_in(0), plan.record.images_in(1)) == (2, 2, 1)
    assert (set(plan.table["source"].to_pylist()), plan.record.num_texts) == ({"images"}, 1)
    assert make_plan(folder, tmp_path / "c.tsv", images_per_shard=2).record == plan.record
    (tmp_path / "c.tsv").write_text("a.jpg\tB.\n")
    assert make_plan(folder, tmp_path / "c.tsv", images_per_shard=2).record.sha256 != plan.record.sha256
