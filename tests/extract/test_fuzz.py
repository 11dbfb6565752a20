"""Whatever bytes come in, an image becomes pixels or a refusal, and annotations a plan or one line that says why not.

Each test tries a fixed handful of inputs. `OSCAR_FUZZ=5000 pytest tests/extract/test_fuzz.py` tries so many random
ones in each instead.
"""

import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from oscar_common.errors import UsageError
from oscar_common.sample import KEY_BYTES, make_key
from oscar_common.settings import Catalog, Extract
from oscar_extract.images import RefusedImage, decode, read_bytes
from oscar_extract.plan import Plan, make_keys, plan_of, planned_images
from oscar_extract.sources.inventory import scan_tar
from oscar_extract.sources.request import make_request

MANY = int(os.environ.get("OSCAR_FUZZ", 0))


def examples(count: int) -> Callable[[Any], Any]:
    """Try `count` examples, always the same ones, or $OSCAR_FUZZ random ones."""
    return settings(
        max_examples=MANY or count,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# Bytes


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file of which some bytes are changed, cut out, repeated or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["replace", "insert", "remove", "repeat", "end"]))
        if kind == "replace":
            content[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
        elif kind == "insert":
            content[start:start] = draw(st.binary(max_size=40))
        elif kind == "remove":
            del content[start:end]
        elif kind == "repeat":
            content[start:start] = content[start:end] * draw(st.integers(1, 9))
        else:
            del content[start:]
    return bytes(content)


# Images


def pictures() -> list[bytes]:
    """A small file of every form and mode that Pillow writes."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for form, modes, options in (
        ("JPEG", ("RGB", "L", "CMYK"), {"exif": exif}),
        ("JPEG", ("RGB",), {"progressive": True}),
        ("PNG", ("RGB", "RGBA", "P", "L", "1", "I;16", "LA"), {"exif": exif}),
        ("WEBP", ("RGB", "RGBA"), {"exif": exif}),
        ("GIF", ("P", "L"), {"save_all": True, "append_images": [Image.new("P", (24, 20))], "transparency": 3}),
        ("TIFF", ("RGB", "CMYK", "I;16", "F", "YCbCr"), {"exif": exif}),
        ("TIFF", ("RGB", "1"), {"compression": "tiff_lzw"}),
        ("BMP", ("RGB", "P", "1"), {}),
        ("JPEG2000", ("RGB", "RGBA"), {}),
        ("PPM", ("RGB", "L", "1"), {}),
        ("TGA", ("RGB", "RGBA"), {"compression": "tga_rle"}),
        ("AVIF", ("RGB",), {}),
    ):
        for mode in modes if form in Image.SAVE else ():
            buffer = io.BytesIO()
            image = Image.fromarray(pixels)
            image = Image.fromarray(pixels[..., 0].astype("u2") * 257) if mode == "I;16" else image.convert(mode)
            image.save(buffer, form, **options)
            found.append(buffer.getvalue())
    return found


PICTURES = pictures()


@st.composite
def odd_images(draw: st.DrawFn) -> bytes:
    """Any bytes, or those of an image with some damage, or with the beginning of another."""
    content = draw(st.binary() | st.sampled_from(PICTURES).flatmap(damaged))
    if draw(st.booleans()):
        size = draw(st.integers(1, 64))
        content = draw(st.sampled_from(PICTURES))[:size] + content[size:]
    return content


def outcome(content: bytes) -> Any:
    try:
        return decode(content)
    except RefusedImage as refused:
        return refused


def check_decoding(content: bytes) -> None:
    found = outcome(content)
    if isinstance(found, RefusedImage):
        assert re.fullmatch("[a-z-]+", found.reason)
        assert str(found)
    else:
        assert found.dtype == np.uint8
        assert found.shape[2:] == (3,)
        assert found.size > 0


@examples(300)
@given(odd_images())
def test_any_bytes_become_pixels_or_are_refused(content):
    check_decoding(content)


@pytest.mark.parametrize("number", range(len(PICTURES)))
def test_every_picture_is_decoded_before_it_is_damaged(number):
    assert decode(PICTURES[number]).shape in ((20, 24, 3), (24, 20, 3))


# Annotations

KEYS = (
    *("image", "images", "annotations", "caption", "captions", "text", "sentences", "raw", "id", "image_id", "split"),
    *("question", "questions", "answer", "file_name", "filename", "path", "cocoid", "coco_id", "qas", "imageId", "key"),
    *("url", "status", "image_urls", "source"),
)
WORDS = st.sampled_from(["a.jpg", "b", "139", "d/c.png", "train", "val", "", "A cat.", "x" * 300])
WORDS |= st.text(st.characters(), max_size=8)  # halves of surrogate pairs, too, as JSON may have them
LEAVES = st.none() | st.booleans() | st.integers() | st.just(10**30) | st.just(-(2**63)) | st.floats() | WORDS
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | WORDS, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value of which something is replaced, added or left out."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 6)) == 0:
        return draw(JSON)
    copy = value.copy()
    where = draw(st.sampled_from(list(copy) if isinstance(copy, dict) else range(len(copy))))
    if draw(st.integers(0, 6)) == 0:
        del copy[where]
    else:
        copy[where] = draw(altered(copy[where]))
    return copy


def column(values: list[Any], form: pa.DataType | None = None) -> pa.Array:
    return pa.array(values, form)


COLUMNS = [
    column(["a.jpg", "b"]), column(["", None]), column(["success", "failed"]), column([139, None]),
    column([1.5, float("nan")]), column([True, None]), column([None, None]), column([["x", None], []]),
    column([["x"], None]), column([[1], [2, 3]]), column([[], []]), column([{"a": 1}, None]),
    column([[{"raw": "x"}], []]), column([[["x"]], [[]]]), column([b"\xff", b"a.jpg"]),
    column(["a.jpg", None], pa.large_string()), column([["x"], ["y"]], pa.large_list(pa.string())),
    column(["a.jpg", "b"]).dictionary_encode(), column([2**50, 1], pa.timestamp("s")),
    column([1, 2], pa.duration("s")), column([1, 2], pa.decimal128(9, 2)), column([1, 2**31 - 1], pa.date32()),
    column([[("k", 1)], []], pa.map_(pa.string(), pa.int64())), column([b"ab", None], pa.binary(2)),
    column([["x"], ["y"]], pa.list_(pa.string(), 1)),
]  # fmt: skip


def tables() -> st.SearchStrategy[bytes]:
    """A Parquet file of the right columns, or some of them, with anything in them; names may be there twice."""
    pairs = st.tuples(st.sampled_from(KEYS) | WORDS.map(lambda w: w.encode(errors="replace").decode()[:20]))
    several = st.lists(st.tuples(pairs.map(lambda p: p[0]), st.sampled_from(COLUMNS)), min_size=1, max_size=4)
    return several.map(lambda found: parquet([c for _, c in found], [n for n, _ in found]))


def parquet(columns: list[pa.Array], names: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, names), buffer)
    return buffer.getvalue()


def lines(value: Any) -> bytes:
    return "\n".join(map(json.dumps, value if isinstance(value, list) else [value])).encode()


CELLS = (
    st.sampled_from(["a.jpg", "1\t" * 120, "b", "image", "caption", "path", '"', "http://x/y.jpg", "\x00", "#", "|"])
    | WORDS
)
ROWS = st.lists(st.lists(CELLS.map(lambda c: c.encode(errors="surrogatepass")), max_size=4), max_size=4)


def contents(name: str, valid: Any) -> st.SearchStrategy[bytes]:
    """What may stand in an annotation file: anything, something of its form, and something close to a valid one."""
    suffix = Path(name).suffix
    if suffix == ".parquet":
        return st.binary() | tables() | damaged(valid)
    if suffix in (".json", ".jsonl"):
        dump = lines if suffix == ".jsonl" else lambda value: json.dumps(value).encode()
        return st.binary() | JSON.map(dump) | damaged(dump(valid)) | altered(valid).map(dump) | altered(valid).map(dump)
    mark = st.sampled_from([b"\t", b",", b"|", b" "])
    rows = st.tuples(mark, ROWS).map(lambda drawn: b"\n".join(drawn[0].join(row) for row in drawn[1]))
    return st.binary() | rows | damaged(valid)


def dumped(name: str, valid: Any) -> bytes:
    if isinstance(valid, bytes):
        return valid
    return lines(valid) if name.endswith(".jsonl") else json.dumps(valid).encode()


RECORDS = [{"image": "a.jpg", "caption": "A cat."}, {"image": "b", "question": "Is it?", "answer": "yes"}]
PLANNED = [
    {"path": "a.jpg", "text": "A cat.", "id": "1", "source": "s"},
    {"path": "d/c.png", "question": "?", "answer": "no"},
]
COCO = {
    "images": [{"id": 139, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [{"id": 1, "image_id": 139, "caption": "A cat."}, {"id": 2, "image_id": 2, "caption": "A dog."}],
}
KARPATHY = {
    "images": [
        {"filename": "139.jpg", "cocoid": 139, "split": "restval", "sentences": [{"raw": "A cat.", "sentid": 1}]},
        {"filename": "2.jpg", "cocoid": 2, "split": "test", "sentences": []},
    ]
}
CAPTIONS = {
    "coco.json": COCO,
    "list.json": RECORDS,
    "c.jsonl": RECORDS,
    "c.csv": b"image,caption\na.jpg,A cat.\n",
    "c.tsv": b"image\tcaption\na.jpg\tA cat.\nb\t\"\n",
    "c.parquet": parquet([column(["a.jpg", "b"]), column(["A cat.", None])], ["image", "caption"]),
    "a.txt": b"A cat.\n\nA dog.\n",
}  # fmt: skip
MANIFESTS = {
    "m.jsonl": PLANNED,
    "m.csv": b"path,text,source\na.jpg,A cat.,s\nd/c.png,,\n",
    "m.tsv": b"path\tid\ttext\na.jpg\t1\tA cat.\n",
    "m.parquet": parquet([column(["a.jpg", "b"]), column([["A cat."], []])], ["path", "text"]),
}
EXCLUDED = {
    "x.json": {"images": [{"filename": "b.jpg", "split": "val"}]},
    "coco.json": COCO, "names.json": {"val": ["a.jpg"], "test": [139]}, "list.json": ["b"],
    "x.txt": b"a\nimages/b\n", "x.csv": b"a.jpg,1\n\"b\",2\n", "x.tsv": b"a.jpg\t1\n",
}  # fmt: skip
VQA = "v2_OpenEnded_mscoco_train2014_questions.json"
DATASETS: dict[str, dict[str, Any]] = {
    "coco": {
        "captions_train2014.json": COCO,
        "instances_val2014.json": {"images": [{"id": 2, "file_name": "2.jpg"}], "annotations": []},
        "dataset_coco.json": KARPATHY,
    },
    "vqa": {
        VQA: {"questions": [{"image_id": 139, "question_id": 1, "question": "Is it?"}]},
        "v2_mscoco_train2014_annotations.json": {"annotations": [{"question_id": 1, "multiple_choice_answer": "yes"}]},
        "dataset_coco.json": KARPATHY,
    },
    "gqa": {
        "train_balanced_questions.json": {"07": {"imageId": "139", "question": "Is it?", "answer": "yes"}},
        "image_data.json": [{"image_id": 139, "coco_id": None}, {"image_id": 2, "coco_id": 2}],
    },
    "vg-qa": {"question_answers.json": [{"id": 139, "qas": [{"qa_id": 1, "question": "Is it?", "answer": "Yes."}]}]},
    "flickr30k": {
        "results_20130124.token": b"139.jpg#0\tA cat.\n139.jpg#1\tIt.\n2.jpg#0\tA dog.\n",
        "test.txt": b"2.jpg\n",
        "dataset_flickr30k.json": KARPATHY,
    },
    "flickr30k/csv": {"results.csv": b"image_name| comment_number| comment\n139.jpg| 0| A cat.\n"},
    "flickr30k/karpathy": {"dataset_flickr30k.json": KARPATHY},
    "cc": {
        "Train_GCC-training.tsv": b"A cat.\thttp://x/139.jpg\nA dog.\thttp://x/2.jpg?a\n",
        "00000.parquet": parquet([column(["1"]), column(["http://x/2.jpg?a"]), column(["failed"])],
                                 ["key", "url", "status"]),
    },
    "sbu": {"SBU_captioned_photo_dataset_urls.txt": b"http://x/139.jpg\nhttp://x/2.jpg\n",
            "SBU_captioned_photo_dataset_captions.txt": b"A cat.\nA dog.\n"},
    "sbu/json": {"sbu-captions-all.json": {"image_urls": ["http://x/139.jpg"], "captions": ["A cat."]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images for each kind of annotations, with nothing else in it."""
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("images", "beside", *(d.replace("/", "-") for d in DATASETS)):
        for number, image in enumerate(("a.jpg", "b.jpg", "b", "d/c.png", "139.jpg", "2.jpg", "000000000139.jpg")):
            (root / name / image).parent.mkdir(parents=True, exist_ok=True)
            (root / name / image).write_bytes(b"%d" % number)
    return root


def planned(**given: Any) -> Any:
    asked = Extract(**given)
    try:
        return plan_of(make_request(asked, Catalog()), asked)
    except UsageError as error:
        return error


def plan(**given: Any) -> Plan | None:
    """Return the plan of a job, None if it is refused in one line; nothing else may come of it."""
    made = planned(**given)
    if isinstance(made, UsageError):
        message = made.message.replace(given.get("images", "-"), "DIR")
        assert len(message.splitlines()) == 1, message
        assert len(made.message) < 2000
        return None
    check_keys(made.table["key"].to_pylist())
    for image in planned_images(made.table):
        assert all((t.kind == "qa") == (t.text is None) == (t.question is not None) for t in image.texts)
    return made


def check_keys(keys: list[str]) -> None:
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9_%-]+", key) and len(key) <= KEY_BYTES for key in keys)


@pytest.mark.parametrize("name", CAPTIONS)
def test_any_captions_make_a_plan_or_one_line(folder, name):
    path = folder / ("beside" if name.endswith(".txt") else ".") / name
    asked = {"images": str(path.parent if name.endswith(".txt") else folder / "images")}
    asked["captions"] = "txt" if name.endswith(".txt") else str(path)

    @examples(25)
    @given(contents(name, CAPTIONS[name]))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        plan(**asked)

    path.write_bytes(dumped(name, CAPTIONS[name]))
    assert plan(**asked).record.num_texts > 0
    check()


@pytest.mark.parametrize("name", MANIFESTS)
def test_any_manifest_makes_a_plan_or_one_line(folder, name):
    path = folder / "images" / name

    @examples(25)
    @given(contents(name, MANIFESTS[name]))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        plan(images=str(path))

    path.write_bytes(dumped(name, MANIFESTS[name]))
    assert plan(images=str(path)).record.num_texts > 0
    check()
    path.unlink()


@pytest.mark.parametrize("name", EXCLUDED)
def test_any_list_of_exclusions_makes_a_plan_or_one_line(folder, name):
    path = folder / name

    @examples(15)
    @given(contents(name, EXCLUDED[name]))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        plan(images=str(folder / "images"), exclude=[str(path)])

    path.write_bytes(dumped(name, EXCLUDED[name]))
    assert plan(images=str(folder / "images"), exclude=[str(path)]).record.num_images < 7
    check()


@pytest.mark.parametrize(("dataset", "name"), [(d, n) for d, files in DATASETS.items() for n in files])
def test_any_annotations_of_a_dataset_make_a_plan_or_one_line(folder, dataset, name):
    root = folder / dataset.replace("/", "-")
    asked = {"dataset": [dataset.partition("/")[0]], "root": [str(root)]}

    @examples(15)
    @given(contents(name, DATASETS[dataset][name]), st.sampled_from(["train", "train,val,test"]))
    def check(content: bytes, splits: str) -> None:
        (root / name).write_bytes(content)
        plan(**asked, splits=splits)

    for other, valid in DATASETS[dataset].items():
        (root / other).write_bytes(dumped(other, valid))
    assert plan(**asked).record.num_texts > 0
    check()
    (root / name).write_bytes(dumped(name, DATASETS[dataset][name]))


def test_any_parquet_file_among_the_images_makes_a_plan_or_one_line(folder):
    path = folder / "images/00000.parquet"
    columns = st.lists(st.sampled_from(COLUMNS), min_size=5, max_size=5)

    @examples(30)
    @given(columns)
    def check(drawn: list[pa.Array]) -> None:
        path.write_bytes(parquet(drawn, ["key", "url", "status", "caption", "error_message"]))
        plan(images=str(folder / "images"))

    check()
    path.unlink()


# Names

SIMPLE = st.text("abAB01_-/. %\\x\n", max_size=12)


@examples(300)
@given(st.lists(st.text(max_size=100) | SIMPLE | st.text("ab/é", min_size=60, max_size=200), max_size=8, unique=True))
@example(["a" * n for n in range(60, 100)] + ["a/" + "b" * n for n in range(60, 100)])
def test_keys_of_many_ids_are_those_of_each(ids):
    made = make_keys(pa.array(ids, pa.string())).to_pylist()
    assert made == [make_key(id) for id in ids]
    check_keys([key for key in made if key])


def is_name(name: bytes) -> bool:
    return name not in (b"", b".", b"..") and len(name) <= 240 and not {0, ord("/")} & set(name)


FILE_NAMES = st.text(max_size=80).map(lambda t: t.encode(errors="replace")) | st.binary(max_size=240)
FILE_NAMES |= st.text("ab\n. %\\xe9", max_size=12).map(str.encode) | st.sampled_from([b"\xe9", b"\\xe9", b"\xe9\\xe9"])
FILE_NAMES = FILE_NAMES.filter(is_name)


@examples(40)
@given(FILE_NAMES, st.lists(st.tuples(FILE_NAMES, st.sampled_from([b"", b".jpg", b".PNG"])), min_size=1, max_size=5))
def test_every_file_is_an_image_of_its_own_whatever_its_name(folder_name, names):
    with tempfile.TemporaryDirectory() as there:
        root = os.path.join(os.fsencode(there), b"x" + folder_name)
        os.mkdir(root)
        files = {name + extension for name, extension in names if not name.startswith(b".")} | {b"x.jpg"}
        for number, name in enumerate(files):
            Path(os.fsdecode(os.path.join(root, name))).write_bytes(b"%d" % number)
        made = plan(images=os.fsdecode(root), captions=None)
        plan(images=os.fsdecode(root), captions="txt")
        expected = {n for n in files if os.path.splitext(os.fsdecode(n))[1].lower() in ("", ".jpg", ".png")}
        found = planned_images(made.table)
        assert {os.fsencode(i.path) if i.raw is None else i.raw for i in found} == expected
        assert len(found) == len(expected)
        assert len({(i.source, i.id) for i in found}) == len(expected)
        assert {i.source for i in found} == {found[0].source}


# Tars


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


MEMBERS = [("0.jpg", PICTURES[0]), ("0.txt", b"A cat."), ("0.json", b'{"url": "u", "caption": "c"}'), ("../1.png", b"")]
NAMES = st.sampled_from(["0.jpg", "0.json", "0.txt", "/a/../b.png", "é" * 120 + ".jpg"]) | st.text(max_size=20)
TARS = st.lists(st.tuples(NAMES, st.binary(max_size=600) | JSON.map(json.dumps).map(str.encode)), max_size=4)


@examples(80)
@given(st.binary() | TARS.map(tar_of).flatmap(lambda t: st.just(t) | damaged(t)) | damaged(tar_of(MEMBERS)))
def test_any_tar_gives_images_that_lie_in_it_and_says_what_is_wrong(content):
    with tempfile.TemporaryDirectory() as there:
        path = Path(there) / "x.tar"
        path.write_bytes(content)
        scan = scan_tar((0, path, "x.tar"))
        assert 0 <= scan.read <= len(content)
        for _, name, _, offset, size, *_ in (row.values() for row in scan.files.to_pylist()):
            assert name.startswith("x.tar/")
            assert ".." not in name.split("/")
            assert offset >= 0
            assert size >= 0
            check_decoding(read_bytes(path, offset, size))
        plan(images=there)


def test_a_sound_tar_is_read_whole(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of(MEMBERS))
    scan = scan_tar((0, tmp_path / "x.tar", "x.tar"))
    assert scan.fault == ""
    rows = [(row["path"], row["url"], row["text"], row["fault"]) for row in scan.files.to_pylist()]
    assert rows == [("x.tar/0.jpg", "u", "c", None), ("x.tar/1.png", None, None, None)]
