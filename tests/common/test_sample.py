"""Keys are safe and never collide."""

import re

from oscar_common.sample import make_key

ODD = [
    "a.b",
    "a/b",
    "a b",
    "a%2Eb",
    "a",
    "A",
    "ä",
    "日本語",
    "a.b.c",
    "a_b",
    "x" * 80,
    "x" * 81,
    "x" * 82,
    "é" * 50,
    "é" * 51,
    "",
]


def test_keys_have_no_dot_or_slash_and_fit_a_tar_header():
    for image_id in ODD:
        assert re.fullmatch(r"[A-Za-z0-9_%-]{0,80}", make_key(image_id))


def test_two_ids_never_share_a_key():
    assert len({make_key(i) for i in ODD}) == len(ODD)


def test_plain_ids_stay_readable():
    assert make_key("COCO_val2014_000000000042") == "COCO_val2014_000000000042"
    assert make_key("a.b/c") == "a%2Eb%2Fc"
