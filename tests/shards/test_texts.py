"""Texts are added to shards, or stand instead of theirs, without a byte of the shards being touched."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_shards import make_samples, write_folder
from support import error_line, run_here

from oscar_common.errors import UsageError
from oscar_common.sample import Sample
from oscar_shards.__main__ import command
from oscar_shards.read import open_folder
from oscar_shards.texts import OVERLAY, overlaid, read_overlay

CAPTIONS = [("5.jpg", "One."), ("image-017", "Two."), ("test/5", "Three."), ("gone.jpg", "Gone.")]  # 5, 17, 5, none


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return make_samples(20)


@pytest.fixture(scope="module")
def shards(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("texts") / "shards", samples)


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def texts(*arguments: object) -> Any:
    return run_here(command, "texts", *arguments)


def write_captions(path: Path) -> Path:
    path.write_text("image\tcaption\n" + "".join(f"{image}\t{text}\n" for image, text in CAPTIONS))
    return path


def said(table: pa.Table, row: int) -> list[str]:
    """What the texts of an image say."""
    return [t["text"] or f"{t['question']} {t['answer']}" for t in table["texts"][row].as_py()]


@pytest.mark.parametrize("replace", ["none", "image", "all"])
def test_new_texts_stand_after_or_instead_of_the_shards_own(
    shards: Path, samples: list[Sample], tmp_path: Path, replace: str
):
    before = state(shards)
    flags = ("--captions", write_captions(tmp_path / "c.tsv"), "--replace", replace, "--out", tmp_path / "o.parquet")
    done = texts(shards, *flags)
    assert done.returncode == 0, done.stderr
    assert "3 texts for 2 of 20 images" in done.stdout
    assert done.stdout.count("\n") == 1
    assert "1 of 4 texts name no image, the first: 'gone.jpg'" in done.stderr
    table = open_folder(shards).table
    changed = overlaid(table, [tmp_path / "o.parquet"])
    new = {5: ["One.", "Three."], 17: ["Two."]}
    for row, sample in enumerate(samples):
        old = [t.text or f"{t.question} {t.answer}" for t in sample.texts]
        kept = old if replace == "none" or (replace == "image" and row not in new) else []
        assert said(changed, row) == kept + new.get(row, [])
    assert changed.schema == table.schema
    assert changed.drop_columns("texts") == table.drop_columns("texts")
    assert {t["source"] for t in changed["texts"][17].as_py()[-1:]} == {"c"}
    assert state(shards) == before


def test_overlays_are_laid_over_in_the_order_given(shards: Path, tmp_path: Path):
    table, files = open_folder(shards).table, []
    for number, replace in enumerate(("all", "none", "image")):
        row = {"key": "image-006", "text": f"From {number}."}
        schema = pa.schema([("key", pa.string()), ("text", pa.string())], {"oscar.texts.replace": replace})
        files.append(tmp_path / f"{number}.parquet")
        pq.write_table(pa.Table.from_pylist([row], schema), files[-1])
    assert said(overlaid(table, files[:2]), 6) == ["From 0.", "From 1."]
    assert said(overlaid(table, files), 6) == ["From 2."]
    assert said(overlaid(table, files[1::-1]), 6) == ["From 0."]


def test_the_same_texts_come_out_of_every_form(shards: Path, tmp_path: Path):
    known = CAPTIONS[:3]
    coco = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(known)]
    rows = [{"image": image, "caption": text} for image, text in known]
    write_captions(tmp_path / "c.tsv")
    (tmp_path / "c.csv").write_text("image,caption\n" + "".join(f'{i},"{t}"\n' for i, t in known))
    (tmp_path / "c.json").write_text(json.dumps({"images": [], "annotations": coco}))
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    found = []
    for form in ("tsv", "csv", "json", "jsonl", "parquet"):
        done = texts(shards, "--captions", tmp_path / f"c.{form}", "--out", tmp_path / f"{form}.parquet")
        assert done.returncode == 0, done.stderr
        found.append(read_overlay(tmp_path / f"{form}.parquet")[0].to_pylist())
    assert [(t["key"], t["id"], t["text"]) for t in found[0]] == [
        ("image-005", "0", "One."), ("image-017", "1", "Two."), ("image-005", "2", "Three.")
    ]  # fmt: skip
    assert all(rows == found[0] for rows in found)


def test_questions_with_answers_and_folders_of_txt_files_are_texts_too(shards: Path, tmp_path: Path):
    (tmp_path / "qa.tsv").write_text("image\tquestion\tanswer\n5\tIs it?\tyes\n")
    asked = [{"image_id": n, "question_id": 10 + n, "question": "Which?"} for n in (7, 8)]
    answered = [{"question_id": 17, "image_id": 7, "multiple_choice_answer": "that one", "answers": []}]
    questions = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    questions.write_text(json.dumps({"questions": asked}))
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": answered}))
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "9.txt").write_text("First.\nSecond.\n")
    files = (tmp_path / "qa.tsv", questions, tmp_path / "beside")
    flags = [flag for file in files for flag in ("--captions", file)]
    done = texts(shards, *flags, "--source", "mine", "--replace", "all", "--out", tmp_path / "new" / "o.parquet")
    assert done.returncode == 0, done.stderr
    table = overlaid(open_folder(shards).table, [tmp_path / "new" / "o.parquet"])
    assert {row: said(table, row) for row in range(20) if said(table, row)} == {
        5: ["Is it? yes"], 7: ["Which? that one"], 9: ["First.", "Second."]
    }  # fmt: skip
    assert {t["source"] for texts in table["texts"].to_pylist() for t in texts} == {"mine"}


def test_coco_names_of_another_year_name_the_same_photo(tmp_path: Path):
    samples = make_samples(3)
    shards = write_folder(tmp_path / "shards", samples)
    (tmp_path / "c.tsv").write_text("image\tcaption\nCOCO_train2014_000000000002.jpg\tTwo.\n000000000001.jpg\tOne.\n")
    assert texts(shards, "--captions", tmp_path / "c.tsv", "--out", tmp_path / "o.parquet").returncode == 0
    assert read_overlay(tmp_path / "o.parquet")[0]["key"].to_pylist() == ["image-002", "image-001"]


def test_a_file_as_pandas_writes_it_is_an_overlay(shards: Path, tmp_path: Path):
    columns = {
        "key": pa.array(["image-006", "image-007", "no-such"]).dictionary_encode(),  # a column of categories
        "text": pa.array(["A.", None, "B."], pa.large_string()),
        "question": [None, "How many?", None],
        "answer": [None, "two", None],
        "id": [1, 2, 3],
        "__index_level_0__": [0, 2, 4],
    }
    pq.write_table(pa.table(columns).replace_schema_metadata({"pandas": "{}"}), tmp_path / "mine.parquet")
    overlay, mode = read_overlay(tmp_path / "mine.parquet")
    assert (overlay.schema.names, mode) == (OVERLAY.names, "none")
    table = overlaid(open_folder(shards).table, [tmp_path / "mine.parquet"])
    assert (said(table, 6)[-1], said(table, 7)[-1]) == ("A.", "How many? two")
    assert [t["kind"] for row in (6, 7) for t in table["texts"][row].as_py()[-1:]] == ["caption", "qa"]
    assert {t["source"] for row in (6, 7) for t in table["texts"][row].as_py()[-1:]} == {"mine"}


def test_keys_of_no_image_are_counted_and_named(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pq.write_table(pa.table({"key": ["image-001", "x", "y"], "text": ["a"] * 3}), tmp_path / "o.parquet")
    overlaid(open_folder(shards).table, [tmp_path / "o.parquet"])
    assert "2 of 3 texts have no image's key, the first: 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "metadata", "message"),
    [
        ({"key": ["x"], "text": ["a"]}, {}, "none of its 1 texts has the key of an image (keys are like 'image-000')"),
        ({"key": ["image-000"], "caption": ["a"]}, {}, "it has the columns key, caption; needed are key, and text or"),
        ({"image": ["image-000"], "text": ["a"]}, {}, "it has the columns image, text; needed are key"),
        ({"key": ["image-000"], "text": [b"a"]}, {}, "the column text is binary, not text"),
        ({"key": ["image-000"], "text": ["a"], "kind": ["poem"]}, {}, "row 0 has the kind 'poem'; known: caption, qa"),
        ({"key": ["image-000", None], "text": ["a", "b"]}, {}, "row 1 lacks its key or its text"),
        ({"key": ["image-000"], "text": [None], "kind": ["qa"]}, {}, "row 0 lacks its key or its question and answer"),
        ({"key": ["image-000"], "text": ["a"]}, {"oscar.texts.replace": "al"}, "replace 'al' (did you mean 'all'?"),
        ({"key": ["image-000"], "text": ["a"]}, {"oscar.texts": "2"}, "format 2; this version reads 1"),
    ],
)
def test_what_is_no_overlay_is_refused_in_one_line(
    shards: Path, tmp_path: Path, columns: dict[str, list[Any]], metadata: dict[str, str], message: str
):
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "o.parquet")
    with pytest.raises(UsageError) as error:
        overlaid(open_folder(shards).table, [tmp_path / "o.parquet"])
    assert message in error.value.message
    assert error.value.message.startswith(f"--texts {tmp_path}/o.parquet: ")
    assert "\n" not in error.value.message


def test_mistakes_are_one_line_and_exit_2_and_leave_nothing(shards: Path, tmp_path: Path):
    write_captions(tmp_path / "c.tsv")
    (tmp_path / "other.tsv").write_text("image\tcaption\nnone.jpg\tNone.\n")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    before, out = state(shards), tmp_path / "o.parquet"
    for captions, to, message in (
        ("other.tsv", out, f"none of its 1 texts names an image of {shards} (images there are like '0.jpg', '0')"),
        ("damaged.parquet", out, "damaged.parquet: cannot be read as .parquet"),
        ("none.tsv", out, "none.tsv: no such file"),
        ("c.tsv", tmp_path / "o.csv", "an overlay is a file that ends in .parquet"),
        ("c.tsv", shards / "shard-000000.parquet", "that is the name of a file of the shards"),
    ):
        done = texts(shards, "--captions", tmp_path / captions, "--out", to)
        assert done.returncode == 2
        assert message in error_line(done)
    assert not out.exists()
    assert state(shards) == before
    done = texts(tmp_path / "nowhere", "--captions", tmp_path / "c.tsv", "--out", out)
    assert (done.returncode, "no such file or folder" in error_line(done)) == (2, True)
