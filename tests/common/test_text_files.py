"""Texts are read as they stand, whatever encoding, line ends and quotation marks their file has; or it is refused."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from oscar_common.captions import read_texts
from oscar_common.config import read_yaml
from oscar_common.errors import UsageError
from oscar_common.text_files import CHUNK, NotText, decode, lines, read_json, split_lines, table_rows

TEXTS = [
    "A cat.",
    '"Hello," he said',
    'a 5" screen',
    '"a 5" screen"',
    '"',
    '""',
    'ends with "',
    "l'été, \u732b \U0001f408",
    "one\u2028line\u0085of \u2029 text\x0b\x0c\x1c\x1d\x1e",
    "NUL \x00 inside" if sys.version_info >= (3, 11) else "NUL",  # Python 3.10's csv module refuses it, by its line
    "commas, and; semicolons | bars",
    "\ufeffa mark inside \ufeff",
    "  spaces around  ",
    "id",
]
ENCODINGS = {
    "utf-8": lambda text: text.encode(),
    "utf-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "utf-16-le with a mark": lambda text: ("\ufeff" + text).encode("utf-16-le"),
    "utf-16-be with a mark": lambda text: ("\ufeff" + text).encode("utf-16-be"),
}
ENDS = {"unix": "\n", "windows": "\r\n", "old mac": "\r"}


def row(number: int) -> str:
    return f"{number}.jpg"


def tsv(end: str, header: bool) -> str:
    first = [f"image\tcaption{end}"] if header else []
    return "".join([*first, *(f"{row(n)}\t{text}{end}" for n, text in enumerate(TEXTS))])


def quoted(end: str, header: bool, how: int = csv.QUOTE_MINIMAL) -> str:
    """CSV by Python's own writer; with quotes around everything, the first field after a mark is quoted."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator=end, quoting=how)
    writer.writerows([*([["image", "caption"]] if header else []), *([row(n), text] for n, text in enumerate(TEXTS))])
    return file.getvalue()


def jsonl(end: str, header: bool, ascii: bool = False) -> str:
    found = ({"image": row(n), "caption": text} for n, text in enumerate(TEXTS))
    return "".join(json.dumps(one, ensure_ascii=ascii) + end for one in found)


FORMS = {
    "tsv": tsv,
    "csv": quoted,
    "all-quoted.csv": lambda end, header: quoted(end, header, csv.QUOTE_ALL),
    "jsonl": jsonl,
    "escaped.jsonl": lambda end, header: jsonl(end, header, ascii=True),
    "json": lambda end, header: json.dumps(
        {
            "images": [{"id": n, "file_name": row(n)} for n in range(len(TEXTS))],
            "annotations": [{"image_id": n, "id": n, "caption": text} for n, text in enumerate(TEXTS)],
        },
        ensure_ascii=False,
        indent=1,
    ).replace("\n", end),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("header", [True, False])
def test_every_encoding_line_end_form_and_quoting_gives_the_same_rows(
    tmp_path: Path, encoding: str, end: str, form: str, header: bool
):
    file = tmp_path / f"c.{form}"
    file.write_bytes(ENCODINGS[encoding](FORMS[form](ENDS[end], header)))
    found = read_texts(file, "c")
    assert found["image"].to_pylist() == [row(n) for n in range(len(TEXTS))]
    assert found["text"].to_pylist() == TEXTS
    assert found["id"].to_pylist() == [str(n) for n in range(len(TEXTS))]


def test_a_csv_field_in_quotes_may_hold_line_breaks_and_doubled_quotes(tmp_path: Path):
    content = 'image,caption\r\na.jpg,"two\nlines, ""both"" of\r\na.jpg"\r\nb.jpg,5" wide\r\n\r\n'
    (tmp_path / "c.csv").write_bytes(content.encode())
    rows = [["image", "caption"], ["a.jpg", 'two\nlines, "both" of\r\na.jpg'], ["b.jpg", '5" wide']]
    assert list(table_rows(tmp_path / "c.csv", "--captions")) == rows


def test_a_return_inside_a_line_is_a_character_of_it(tmp_path: Path):
    (tmp_path / "c.tsv").write_bytes(b"a.jpg\tone\rtwo\nb.jpg\tthree\r\n")
    assert list(table_rows(tmp_path / "c.tsv", "")) == [["a.jpg", "one\rtwo"], ["b.jpg", "three"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.tsv", "a.jpg\tA cat.\nb.jpg\tcafé".encode("latin1"), r"line 2 is not UTF-8 \(byte 0xe9 after '.*caf'\)"),
        (
            "c.csv",
            "image,caption\ra,café\r".encode("latin1"),
            ": iconv -f latin1 -t utf-8 .*/c.csv > .*/c.utf8.csv",
        ),
        ("c.jsonl", '{"image": "a", "text": "é"}'.encode("latin1"), "line 1 is not UTF-8"),
        ("c.json", '[\n{"image": "a", "text": "é"}]'.encode("latin1"), "line 2 is not UTF-8"),
        ("c.json", '[{"image": "a", "text": "\ud83d"}]'.encode(errors="surrogatepass"), "line 1 is not UTF-8"),
        ("c.tsv", "a.jpg\tA café.\n".encode("utf-16-le"), "UTF-16, without .* iconv -f utf-16le -t utf-8 .*/c.tsv"),
        ("c.tsv", "a.jpg\tA café.\n".encode("utf-16-be"), "UTF-16, without .* iconv -f utf-16be -t utf-8 .*/c.tsv"),
        ("c.tsv", "a.jpg\tA café.\n".encode("utf-32"), "in UTF-32; .* iconv -f utf-32"),
        ("c.tsv", "a.jpg\tA\nb.jpg\tB".encode("utf-16")[:-1], "line 2 is not the UTF-16 that its byte-order mark"),
        ("c.tsv", b"a.jpg\tcaf\xc3", "line 1 is not UTF-8"),
        ("my c.tsv", b"a.jpg\tcaf\xe9", "iconv -f latin1 -t utf-8 '.*/my c.tsv' > '.*/my c.utf8.tsv'"),
        ("c.csv", b'a,b\na,"never closed\nb,c\n', "row at line 2 is not CSV .unexpected end of data"),
        ("c.csv", b'a,b\nc,d\na,"Hi," he "said"\nb,c\n', "row at line 3 is not CSV .',' expected"),
        ("c.csv", b"image,caption\na.jpg,A cat, sitting\n", "line 2 has 3 cells, the first row 2.* comma .* quote it"),
        ("c.tsv", b"image\tcaption\n\na.jpg\tA\tcat\n", "line 3 has 3 cells, the first row 2.* tab .* a space"),
        ("c.jsonl", b'{"image": "a", "text": "t"}\n\n{"image": "a",\n', "line 3 is not JSON: Expecting"),
        ("c.jsonl", b'{"image": "a", "text": "t"}\n["b", "u"]\n', r"row 1 is no object, \{...\}, but \['b', 'u'\]"),
        ("c.tsv", b"image\tcomment\na.jpg\tA cat.\n", "row 0 has the columns image, comment; needed are"),
        ("c.csv", b"Photo,Caption\na.jpg,A cat.\n", "row 0 has the columns photo, caption; needed are"),
        ("c.tsv", b"img\tdesc\na.jpg\tA cat.\n", "row 0 has the columns img, desc; needed are"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line_and_what_to_do(
    tmp_path: Path, name: str, content: bytes, message: str
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        read_texts(tmp_path / name, "c")
    assert error.value.message.startswith(f"--captions {tmp_path / name}: ")
    assert len(error.value.message.splitlines()) == 1


def test_the_line_is_named_in_long_files_too(tmp_path: Path):
    line = b"a.jpg\t" + "é".encode() * 50 + b"\n"
    count = 3 * CHUNK // len(line)
    (tmp_path / "c.tsv").write_bytes(line * count)
    assert list(lines(tmp_path / "c.tsv", "")) == [line.decode().rstrip()] * count
    (tmp_path / "c.tsv").write_bytes(line * count + b"a.jpg\t\xe9" + line)
    with pytest.raises(UsageError, match=f"line {count + 1} is not UTF-8"):
        list(lines(tmp_path / "c.tsv", ""))


@pytest.mark.parametrize("first", ["key\tA photo of a key.", "dog\tcat", "a.jpg\timage", "1\tid"])
def test_a_first_row_that_is_a_caption_is_no_header(tmp_path: Path, first: str):
    (tmp_path / "c.tsv").write_text(f"{first}\nb.jpg\tA cat.\n")
    assert len(read_texts(tmp_path / "c.tsv", "c")) == 2


@pytest.mark.parametrize("column", ["image", "file", "file_name", "path", "image_path", "image_name", "image_id"])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_an_id_beside_the_name_of_a_file_is_not_the_images(tmp_path: Path, capsys, column: str, form: str):
    file = tmp_path / f"c.{form}"
    row = {"id": "7", column: "a.jpg", "caption": "A cat."}
    file.write_text(json.dumps(row) if form == "jsonl" else f"{','.join(row)}\n{','.join(row.values())}\n")
    assert read_texts(file, "c")["image"].to_pylist() == ["a.jpg"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_an_id_that_may_be_the_rows_is_taken_for_the_images_and_said_so(tmp_path: Path, capsys, form: str):
    file = tmp_path / f"c.{form}"
    row = {"id": "7", "where": "a.jpg", "caption": "A cat."}
    file.write_text(json.dumps(row) if form == "jsonl" else f"{','.join(row)}\n{','.join(row.values())}\n")
    assert read_texts(file, "c")["image"].to_pylist() == ["7"]
    assert f"--captions {file}: its column id is taken for the image's; of its other columns (where)" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_settings_lists_and_json_are_read_alike(tmp_path: Path, encoding: str):
    encode = ENCODINGS[encoding]
    (tmp_path / "a.yaml").write_bytes(encode("name: Größe\n"))
    assert read_yaml(tmp_path / "a.yaml", "--pipelines") == {"name": "Größe"}
    (tmp_path / "a.json").write_bytes(encode('["Größe"]'))
    assert read_json(tmp_path / "a.json", "--exclude") == ["Größe"]
    assert split_lines(decode(encode("a\u2028b\r\n\x85\n"))) == ["a\u2028b", "\x85"]


def test_settings_in_another_encoding_are_refused_in_one_line(tmp_path: Path):
    (tmp_path / "a.yaml").write_bytes("a: 1\nname: Größe\n".encode("latin1"))
    with pytest.raises(UsageError, match=r"--pipelines .*a.yaml: line 2 is not UTF-8 .*iconv"):
        read_yaml(tmp_path / "a.yaml", "--pipelines")
    with pytest.raises(NotText, match="line 1 is not UTF-8"):
        decode(b"\xe9")
