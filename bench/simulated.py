"""A corpus of the size of Oscar's, with real rows and no pixels: annotation files as published, or one manifest."""

import json
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

OSCAR = {  # images and texts of Oscar's corpus (Li et al. 2020, appendix)
    "coco": (112_000, 560_000),
    "cc": (3_000_000, 3_000_000),
    "sbu": (840_000, 840_000),
    "flickr30k": (29_000, 145_000),
    "vqa": (83_000, 444_000),
    "gqa": (79_000, 1_026_000),
    "vg-qa": (48_000, 484_000),
}
IMAGES_OF = {"vqa": "coco", "gqa": "vg", "vg-qa": "vg"}  # whose images a dataset asks about
IN_FOLDER = IN_TAR = 10_000
VG = 2_300_000  # the first image
WORDS = ("a", "the", "man", "woman", "dog", "street", "red", "sitting", "with", "of", "in", "on", "two", "people", "to")
Sizes = dict[str, tuple[int, int]]


def make_manifest(path: Path, sizes: Sizes) -> None:
    """Write a row for each text: the image's path, the text, and the dataset."""
    tables = []
    for name, (images, texts) in sizes.items():
        folder = f"{IMAGES_OF.get(name, name)}/images"
        number = (np.arange(texts) % images).astype(np.int64)
        parts = [pa.array(n).cast(pa.string()) for n in (number // IN_FOLDER, number)]
        paths = pc.binary_join_element_wise(folder, *parts, "/")
        paths = pc.binary_join_element_wise(paths, "jpg", ".")
        tables.append(pa.table({"path": paths, "text": phrases(texts, 10), "source": pa.repeat(name, texts)}))
    pq.write_table(pa.concat_tables(tables), path)


def phrases(number: int, words: int) -> pa.Array:
    """Return so many texts of so many words each."""
    rng, vocabulary = np.random.default_rng(0), pa.array(WORDS)
    return pc.binary_join_element_wise(
        *(vocabulary.take(pa.array(rng.integers(len(WORDS), size=number))) for _ in range(words)), " "
    )


def make_published(root: Path, sizes: Sizes) -> None:
    """Write annotation files as they are published, with their fields, and image files under the names in use."""
    numbers = count()
    make_coco(root / "coco", *sizes["coco"], numbers)
    make_cc(root / "cc", *sizes["cc"], numbers)
    make_sbu(root / "sbu", *sizes["sbu"], numbers)
    make_flickr30k(root / "flickr30k", *sizes["flickr30k"], numbers)
    make_vqa(root / "vqa", *sizes["vqa"])
    make_gqa(root / "gqa", *sizes["gqa"], numbers)
    make_vg_qa(root / "vg-qa", *sizes["vg-qa"], sizes["gqa"][0])


def make_images(folder: Path, names: Iterable[str], numbers: Iterator[int]) -> None:
    """Write a file of 12 bytes for each name, no two the same."""
    inner = None
    for name, number in zip(names, numbers, strict=False):
        if (parent := name.rpartition("/")[0]) != inner:
            (folder / parent).mkdir(parents=True, exist_ok=True)
            inner = parent
        with open(f"{folder}/{name}", "wb", buffering=0) as file:
            file.write(b"%012d" % number)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_coco(root: Path, images: int, texts: int, numbers: Iterator[int]) -> None:
    names = [f"COCO_train2014_{n + 1:012d}.jpg" for n in range(images)]
    make_images(root, (f"train2014/{name}" for name in names), numbers)
    url = "http://farm5.staticflickr.com/4153/5014840696_98687a0c34_z.jpg"
    listed = [
        {"license": 5, "file_name": name, "coco_url": url, "height": 480, "width": 640, "flickr_url": url, "id": n + 1}
        for n, name in enumerate(names)
    ]
    captions = [
        {"image_id": n % images + 1, "id": n, "caption": text} for n, text in enumerate(phrases(texts, 10).to_pylist())
    ]
    write_json(root / "annotations/captions_train2014.json", {"images": listed, "annotations": captions})


def make_cc(root: Path, images: int, texts: int, numbers: Iterator[int]) -> None:
    urls = [f"https://images.example.com/photos/2018/{n % 365}/{n * 7919 % images:x}/photo.jpg" for n in range(images)]
    captions = phrases(texts, 10).to_pylist()
    make_tars(root / "images", urls, captions, numbers)
    with (root / "Train_GCC-training.tsv").open("w") as file:
        file.writelines(f"{text}\t{url}\n" for text, url in zip(captions, urls, strict=True))


def make_sbu(root: Path, images: int, texts: int, numbers: Iterator[int]) -> None:
    urls = [f"http://static.flickr.com/{n % 5000}/{4385058960 + 31 * n}_b0e291f86e.jpg" for n in range(images)]
    captions = phrases(texts, 12).to_pylist()
    make_tars(root / "images", urls, captions, numbers)
    for name, lines in (("urls", urls), ("captions", captions)):
        with (root / f"SBU_captioned_photo_dataset_{name}.txt").open("w") as file:
            file.writelines(f"{line}\n" for line in lines)


def make_tars(folder: Path, urls: list[str], captions: list[str], numbers: Iterator[int]) -> None:
    """Write what img2dataset does: tars with an image, its caption and what is known of it, and a table of each tar."""
    folder.mkdir(parents=True)
    sizes = {"width": 256, "height": 256, "original_width": 1024, "original_height": 768, "exif": "{}"}
    for shard, start in enumerate(range(0, len(urls), IN_TAR)):
        there = list(zip(urls[start : start + IN_TAR], captions[start : start + IN_TAR], strict=True))
        records = [
            {"caption": text, "url": url, "key": f"{shard:05}{n:04}", "status": "success", "error_message": None}
            for n, (url, text) in enumerate(there)
        ]
        pq.write_table(pa.Table.from_pylist(records), folder / f"{shard:05}.parquet")
        with (folder / f"{shard:05}.tar").open("wb") as tar:
            for record, number in zip(records, numbers, strict=False):
                tar.write(member(f"{record['key']}.jpg", b"%012d" % number))
                tar.write(member(f"{record['key']}.json", json.dumps(record | sizes).encode()))
                tar.write(member(f"{record['key']}.txt", str(record["caption"]).encode()))
            tar.write(bytes(1024))


def member(name: str, content: bytes) -> bytes:
    """Return a file in a tar, as tarfile writes it, but ten times as fast."""
    front = name.encode().ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + b"%011o\0%011o\0" % (len(content), 0)
    back = b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(247)
    checksum = b"%06o\0 " % (sum(front) + sum(back) + sum(b" " * 8))
    return front + checksum + back + content + bytes(-len(content) % 512)


def make_flickr30k(root: Path, images: int, texts: int, numbers: Iterator[int]) -> None:
    names = [f"{1000092795 + 17 * n}.jpg" for n in range(images)]
    make_images(root, (f"flickr30k-images/{name}" for name in names), numbers)
    with (root / "results_20130124.token").open("w") as file:
        for n, text in enumerate(phrases(texts, 12).to_pylist()):
            file.write(f"{names[n % images]}#{n // images}\t{text}\n")


def make_vqa(root: Path, images: int, texts: int) -> None:
    asked = [
        {"image_id": n % images + 1, "question": text, "question_id": n}
        for n, text in enumerate(phrases(texts, 6).to_pylist())
    ]
    write_json(root / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": asked})
    answers = [{"answer": "yes", "answer_confidence": "maybe", "answer_id": n + 1} for n in range(10)]
    given = {"question_type": "is the", "multiple_choice_answer": "yes", "answers": answers, "answer_type": "yes/no"}
    said = [given | {"image_id": n % images + 1, "question_id": n} for n in range(texts)]
    write_json(root / "v2_mscoco_train2014_annotations.json", {"annotations": said})


def make_gqa(root: Path, images: int, texts: int, numbers: Iterator[int]) -> None:
    make_images(root, (f"images/{VG + n}.jpg" for n in range(images)), numbers)
    program = [
        {"operation": "select", "dependencies": [], "argument": "sky (2486325)"},
        {"operation": "verify color", "dependencies": [0], "argument": "dark"},
    ]
    rest = {
        "semantic": program,
        "entailed": ["02930160", "02930158", "02930159", "02930154"],
        "equivalent": ["02930152"],
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "answer": "yes",
        "fullAnswer": "Yes, the sky is dark.",
    }
    asked = {
        f"{n:08}": rest | {"question": text, "imageId": str(VG + n % images)}
        for n, text in enumerate(phrases(texts, 8).to_pylist())
    }
    write_json(root / "train_balanced_questions.json", asked)


def make_vg_qa(root: Path, images: int, texts: int, all_images: int) -> None:
    listed = [
        {"width": 800, "url": f"https://cs.stanford.edu/people/rak248/VG_100K_2/{VG + n}.jpg", "height": 600}
        | {"image_id": VG + n, "coco_id": n // 2 + 1 if n < all_images // 2 * 2 and n % 2 else None, "flickr_id": None}
        for n in range(all_images)
    ]
    write_json(root / "image_data.json", listed)
    near = [{"object_id": 1058507, "x": 421, "y": 91, "w": 79, "h": 339, "name": "tree", "synsets": ["tree.n.01"]}]
    asked: list[list[dict[str, Any]]] = [[] for _ in range(images)]
    for n, text in enumerate(phrases(texts, 6).to_pylist()):
        question = {"a_objects": near, "question": text, "image_id": VG + n % images, "qa_id": n}
        asked[n % images].append(question | {"answer": "Dark.", "q_objects": near})
    write_json(root / "question_answers.json", [{"id": VG + n, "qas": qas} for n, qas in enumerate(asked)])
