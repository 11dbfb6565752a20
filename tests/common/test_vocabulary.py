"""Names of classes and attributes, as the reference extractors show them."""

import json

import pytest

from oscar_common.errors import UsageError
from oscar_common.vocabulary import NAMES, read_names


def test_visual_genomes_names_come_with_the_package():
    objects = read_names("--classes", NAMES / "objects.txt")
    attributes = read_names("--attributes", NAMES / "attributes.txt")
    assert (len(objects), len(set(objects)), objects[0], objects[16]) == (1600, 1600, "yolk", "stop sign")
    assert (len(attributes), len(set(attributes))) == (400, 400)


def test_the_first_synonym_in_lower_case_is_the_name(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"Stop Sign,stopsign\r\n dog \r\n\r\nT-shirt\r\n")
    assert read_names("--classes", tmp_path / "names.txt") == ["stop sign", "dog", "t-shirt"]


def test_a_label_map_is_read_in_its_order(tmp_path):
    content = {"label_to_idx": {"cat": 2, "zebra": 1}, "attribute_to_idx": {"red": 1, "old": 2}}
    (tmp_path / "map.json").write_text(json.dumps(content))
    assert read_names("--classes", tmp_path / "map.json", "label_to_idx") == ["zebra", "cat"]
    assert read_names("--attributes", tmp_path / "map.json", "attribute_to_idx") == ["red", "old"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("no.txt", None, "no such file"), ("bytes.txt", b"cat\ncaf\xe9", "line 2 is not UTF-8"),
     ("empty.txt", b"\n", "no name in it"), ("map.json", b"[]", "cannot be"),
     ("map.json", b"{}", "it has no 'label_to_idx'"), ("map.json", b"{", "cannot be read")],
)  # fmt: skip
def test_what_is_no_vocabulary_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        read_names("--classes", tmp_path / name, "label_to_idx")
    assert "--classes" in error.value.message
