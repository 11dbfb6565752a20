"""Published datasets are read in the layouts in which people have them, and joined without leaks or collisions.

Every test writes a miniature of a dataset as it is published. Planning decodes nothing, so images are a few bytes.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oscar_common.errors import UsageError
from oscar_common.settings import Catalog, Dataset, Extract
from oscar_extract.plan import Plan, PlannedImage, inputs_digest, plan_of, planned_images, read_shard_plan, saved_plan
from oscar_extract.plan import write_plan as store
from oscar_extract.sources.corpus import find_files
from oscar_extract.sources.duplicates import locate
from oscar_extract.sources.remote import Cache
from oscar_extract.sources.request import make_request
from oscar_shards.manifest import PLAN_FILE
from oscar_shards.tar import Window, members


def put(folder: Path, *names: str) -> Path:
    """Write files whose bytes are their own path, so that no two are the same."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{folder}/{name}".encode())
    return folder


def write(path: Path, content: object) -> Path:
    """Write lines, a table of Parquet, or an object as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        assert isinstance(content, Iterable)
        path.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
    return path


def plan(dataset: str = "", root: object = (), catalog: Catalog | None = None, **settings: object) -> Plan:
    roots = [str(r) for r in (root if isinstance(root, list | tuple) else [root])]
    texts = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    asked = Extract(dataset=[dataset] if dataset else [], root=roots, **texts)
    return plan_of(make_request(asked, catalog or Catalog()), asked)


def images(plan: Plan) -> dict[str, PlannedImage]:
    return {f"{i.source}/{i.id}": i for i in planned_images(plan.table)}


def paths(plan: Plan) -> dict[str, str]:
    return {name: image.path for name, image in images(plan).items()}


def said(plan: Plan) -> dict[str, list[tuple[str, str]]]:
    """What the texts of each image say, with their sources."""
    return {n: [(t.source, t.text or f"{t.question} {t.answer}") for t in i.texts] for n, i in images(plan).items()}


def counts(plan: Plan) -> dict[str, tuple[int, int, dict[str, int]]]:
    return {c.dataset: (c.images, c.texts, c.left_out) for c in plan.counts}


def left_out(plan: Plan, reason: str) -> list[str]:
    return [r["image"] for r in plan.left_out.to_pylist() if r["reason"] == reason]


def content(plan: Plan, name: str) -> bytes:
    """The bytes of an image, as a worker finds them."""
    i = images(plan)[name]
    path, offset, size = locate(plan.roots, i.root, i.path, i.raw, i.offset, i.size)
    data = Path(path).read_bytes()[offset:]
    return data if size is None else data[:size]


# COCO

TRAIN, VAL, TEST = 9, 42, 581929
CAPTIONS = {
    TRAIN: ["Closeup of bins of food.", "A meal."],
    25: ["A giraffe."],
    VAL: ["This wire rack holds shoes."],
    73: ["A motorcycle."],
}


def coco_json(kind: str, name: str, numbers: Sequence[int]) -> dict[str, object]:
    notes: list[dict[str, object]] = [
        {"id": 100 * n + k, "image_id": n, "caption": text}
        if kind == "captions"
        else {"id": 100 * n + k, "image_id": n, "category_id": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0}
        for n in numbers
        for k, text in enumerate(CAPTIONS[n])
    ]
    listed = [
        {"id": n, "file_name": name.format(n), "width": 640, "height": 480, "coco_url": f"http://x/{n}.jpg"}
        for n in numbers
    ]
    return {"info": {}, "licenses": [], "images": listed, "annotations": notes}


def coco(root: Path, year: int = 2014, notes: str = "annotations", extension: str = "jpg") -> Path:
    for split, numbers in (("train", (TRAIN, 25)), ("val", (VAL, 73))):
        name = f"COCO_{split}2014_{{:012d}}.jpg" if year == 2014 else "{:012d}.jpg"
        for kind in ("captions", "instances"):
            write(root / notes / f"{kind}_{split}{year}.json", coco_json(kind, name, numbers))
        put(root, *(f"{split}{year}/{name.format(n).replace('jpg', extension)}" for n in numbers))
    return root


def karpathy(root: Path, **splits: Sequence[int]) -> Path:
    listed = [
        {
            "filepath": "train2014" if n in (TRAIN, 25) else "val2014",
            "filename": f"COCO_{'train' if n in (TRAIN, 25) else 'val'}2014_{n:012d}.jpg",
            "cocoid": n,
            "imgid": 0,
            "sentids": [100 * n],
            "split": split,
            "sentences": [{"raw": t, "tokens": t.split(), "imgid": 0, "sentid": 100 * n} for t in CAPTIONS[n]],
        }
        for split, numbers in splits.items()
        for n in numbers
    ]
    return write(root / "dataset_coco.json", {"images": listed, "dataset": "coco"})


@pytest.mark.parametrize(
    ("year", "notes"), [(2014, "annotations"), (2017, "annotations_trainval/annotations"), (2017, "")]
)
def test_coco_has_the_captions_of_its_training_images(tmp_path, year, notes):
    found = plan("coco", coco(tmp_path, year, notes))
    name = f"train{year}/{'COCO_train2014_' if year == 2014 else ''}000000000009.jpg"
    assert paths(found)["coco/9"] == name
    assert said(found)["coco/9"] == [("coco", "Closeup of bins of food."), ("coco", "A meal.")]
    assert [(t.kind, t.id) for t in images(found)["coco/9"].texts] == [("caption", "900"), ("caption", "901")]
    assert counts(found) == {"coco": (2, 3, {"held-out": 2})}
    assert sorted(left_out(found, "held-out")) == ["coco/42", "coco/73"]
    assert images(found)["coco/9"].key == "coco%2F9"


@pytest.mark.parametrize("extension", ["jpeg", "png", "JPG", "webp"])
def test_coco_files_of_another_form_or_year_are_the_same_images(tmp_path, extension):
    coco(tmp_path, 2017, extension=extension)
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").rename(tmp_path / f"{split}2014")  # the annotations say 2017
    assert set(paths(plan("coco", tmp_path))) == {"coco/9", "coco/25"}


def test_coco_images_may_all_lie_in_one_folder(tmp_path):
    coco(tmp_path)
    for path in [*tmp_path.rglob("*.jpg")]:
        put(tmp_path, f"images/{path.name}")
        path.unlink()
    assert paths(plan("coco", tmp_path))["coco/9"] == "images/COCO_train2014_000000000009.jpg"


def test_segmentation_maps_are_not_taken_for_photographs(tmp_path):
    coco(tmp_path, 2014)
    put(tmp_path, "annotations/panoptic_train2017/000000000009.png", "stuffthingmaps/train2017/000000000009.png")
    (tmp_path / "train2014").rename(tmp_path / "train2017")
    for path in (tmp_path / "train2017").iterdir():
        path.rename(path.with_name(path.name.removeprefix("COCO_train2014_")))
    assert paths(plan("coco", tmp_path))["coco/9"] == "train2017/000000000009.jpg"


def test_coco_of_both_years_is_each_image_and_caption_once(tmp_path):
    coco(tmp_path, 2014)
    coco(tmp_path, 2017)
    assert counts(plan("coco", tmp_path)) == {"coco": (2, 3, {"held-out": 2})}


def test_the_test_images_are_known_from_their_list_and_kept_out(tmp_path):
    coco(tmp_path)
    listed = [{"id": TEST, "file_name": f"COCO_test2014_{TEST:012d}.jpg"}]
    write(tmp_path / "annotations/image_info_test2014.json", {"images": listed, "categories": []})
    put(tmp_path, f"test2014/COCO_test2014_{TEST:012d}.jpg")
    assert f"coco/{TEST}" in left_out(plan("coco", tmp_path), "held-out")


def test_splits_takes_other_splits(tmp_path):
    assert set(images(plan("coco", coco(tmp_path), splits="val"))) == {"coco/42", "coco/73"}
    both = plan("coco", tmp_path, splits="train, val")
    assert counts(both) == {"coco": (4, 5, {})}
    with pytest.raises(UsageError, match="'dev' is not allowed"):
        plan("coco", tmp_path, splits="dev")


def test_karpathys_split_decides_and_restval_is_trained_on(tmp_path):
    coco(tmp_path)
    karpathy(tmp_path, train=(TRAIN,), test=(25,), restval=(VAL,), val=(73,))
    found = plan("coco", tmp_path)
    assert set(said(found)) == {"coco/9", "coco/42"}
    assert said(found)["coco/42"] == [("coco", "This wire rack holds shoes.")]
    assert counts(found) == {"coco": (2, 3, {"held-out": 2})}


@pytest.mark.parametrize("present", [(), ("captions_train2014.json",), ("instances_train2014.json",)])
def test_karpathys_file_says_the_captions_that_no_other_file_says(tmp_path, present):
    coco(tmp_path)
    karpathy(tmp_path, train=(TRAIN,), val=(25,), restval=(VAL,), test=(73,))
    for path in (tmp_path / "annotations").iterdir():
        if path.name not in present:
            path.unlink()
    found = plan("coco", tmp_path)
    assert {name: [text for _, text in texts] for name, texts in said(found).items()} == {
        "coco/9": CAPTIONS[TRAIN], "coco/42": CAPTIONS[VAL],
    }  # fmt: skip
    assert counts(found) == {"coco": (2, 3, {"held-out": 2})}


def test_an_image_without_a_file_is_missing_and_its_texts_are_counted(tmp_path):
    coco(tmp_path)
    (tmp_path / "train2014/COCO_train2014_000000000009.jpg").unlink()
    found = plan("coco", tmp_path)
    assert counts(found) == {"coco": (1, 1, {"held-out": 2, "missing": 1, "text-without-image": 2})}
    assert left_out(found, "missing") == ["coco/9"]
    assert found.record.num_missing == 1


def test_instances_alone_give_images_without_texts(tmp_path):
    coco(tmp_path)
    for path in tmp_path.rglob("captions_*"):
        path.unlink()
    assert counts(plan("coco", tmp_path)) == {"coco": (2, 0, {"held-out": 2})}


def test_a_root_without_annotations_is_an_error_that_names_them(tmp_path):
    put(tmp_path, "train2014/COCO_train2014_000000000009.jpg")
    with pytest.raises(UsageError, match=r"no captions_.*json.* --dataset coco needs"):
        plan("coco", tmp_path)
    for root in ("nowhere", "train2014/COCO_train2014_000000000009.jpg"):
        with pytest.raises(UsageError, match=f"--root .*{root}: (no such folder|a file, not a folder)"):
            plan("coco", tmp_path / root)
    write(tmp_path / "captions_train2014.json", {"annotations": []})
    with pytest.raises(UsageError, match=r"captions_train2014.json: cannot be read"):
        plan("coco", tmp_path)


# VQA v2


def vqa(root: Path, version: str = "v2_", notes: str = "") -> Path:
    for split, number in (("train2014", TRAIN), ("val2014", VAL)):
        ids = [number * 1000, number * 1000 + 1]
        asked = [{"image_id": number, "question": f"What is {i}?", "question_id": i} for i in ids]
        answers = [
            {
                "question_id": ids[0],
                "image_id": number,
                "multiple_choice_answer": "food",
                "answers": [{"answer": "meal", "answer_confidence": "yes", "answer_id": 1}],
                "question_type": "what is",
                "answer_type": "other",
            }
        ]
        name = f"{version}OpenEnded_mscoco_{split}_questions.json"
        write(root / notes / name, {"info": {}, "questions": asked, "data_subtype": split})
        write(root / notes / f"{version}mscoco_{split}_annotations.json", {"info": {}, "annotations": answers})
    asked = [{"image_id": TEST, "question": "Who?", "question_id": TEST * 1000}]
    for subset in ("test2015", "test-dev2015"):
        write(root / notes / f"{version}OpenEnded_mscoco_{subset}_questions.json", {"questions": asked})
    return root


NO_CACHE = Cache(Path("none"), 0)
QUESTION = ("vqa", "What is 9000? food")


@pytest.mark.parametrize("notes", ["", "questions", "annotations"])
def test_vqa_has_the_answered_questions_about_coco_images_beside_them(tmp_path, notes):
    vqa(tmp_path, notes=notes)
    put(tmp_path, "train2014/COCO_train2014_000000000009.jpg", "val2014/COCO_val2014_000000000042.jpg")
    put(tmp_path, f"test2015/COCO_test2015_{TEST:012d}.jpg")
    found = plan("vqa", tmp_path)
    (image,) = planned_images(found.table)
    assert (image.source, image.id, image.path) == ("coco", "9", "train2014/COCO_train2014_000000000009.jpg")
    (text,) = image.texts
    assert (text.kind, text.source, text.id, text.text) == ("qa", "vqa", "9000", None)
    assert (text.question, text.answer) == ("What is 9000?", "food")
    assert counts(found) == {"vqa": (1, 1, {"held-out": 2})}


def test_vqa_test_dev_alone_is_kept_out_as_well(tmp_path):
    vqa(tmp_path)
    (tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    put(tmp_path, "train2014/COCO_train2014_000000000009.jpg", f"test2015/COCO_test2015_{TEST:012d}.jpg")
    assert f"coco/{TEST}" in left_out(plan("vqa", tmp_path), "held-out")


def test_vqa_of_both_versions_is_version_2(tmp_path):
    vqa(tmp_path)
    vqa(tmp_path, version="")
    old = [{"image_id": 900, "question": "Old?", "question_id": 9000}]
    write(tmp_path / "OpenEnded_mscoco_train2014_questions.json", {"questions": old})
    put(tmp_path, "train2014/COCO_train2014_000000000009.jpg", "train2014/COCO_train2014_000000000900.jpg")
    assert said(plan("vqa", tmp_path)) == {"coco/9": [QUESTION]}


def test_vqa_without_the_answers_to_its_questions_is_an_error(tmp_path):
    vqa(tmp_path)
    put(tmp_path, "train2014/COCO_train2014_000000000009.jpg")
    (tmp_path / "v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(UsageError, match=r"has no .*mscoco_train.*_annotations.json"):
        plan("vqa", tmp_path)


def test_karpathys_restval_is_trained_on_although_vqa_validates_on_it(tmp_path):
    vqa(coco(tmp_path))
    karpathy(tmp_path, train=(TRAIN, 25), restval=(VAL,), val=(73,))
    found = plan("coco,vqa", tmp_path)
    assert said(found)["coco/42"] == [("coco", "This wire rack holds shoes.")]
    assert set(images(plan("vqa", tmp_path))) == {"coco/9"}


# GQA and Visual Genome

VG, VG_COCO, VG_VAL = 2370799, 150367, 2370800  # one of its own, one that is COCO's 9, one of GQA's validation


def gqa(root: Path, questions: str = "questions1.2", kind: str = "balanced", pictures: str = "images") -> Path:
    for split, numbers in (("train", (VG, VG_COCO)), ("val", (VG_VAL,)), ("testdev", (77,)), ("test", (78,))):
        asked = {
            f"0{n}": {
                "imageId": str(n),
                "question": f"Is {n} here?",
                "fullAnswer": "Yes, it is.",
                "isBalanced": True,
                **({} if split == "test" else {"answer": "yes"}),
            }
            for n in numbers
        }
        if kind == "all" and split == "train":
            for part, (number, entry) in enumerate(asked.items()):
                write(root / questions / f"train_all_questions/train_all_questions_{part}.json", {number: entry})
        else:
            write(root / questions / f"{split}_{kind}_questions.json", asked)
        put(root / pictures, *(f"{n}.jpg" for n in numbers))
    return root


def vg(root: Path, ids: str = "image_id") -> Path:
    asked = [
        {
            ids.removeprefix("image_"): n,
            "qas": [
                {"a_objects": [], "question": f"Where is {n}?", "image_id": n, "qa_id": 10 * n, "answer": "Outside."}
            ],
        }
        for n in (VG, VG_COCO)
    ]
    write(root / "question_answers.json", asked)
    known = [
        {ids: VG, "coco_id": None, "flickr_id": None, "url": f"https://x/VG_100K_2/{VG}.jpg"},
        {ids: VG_COCO, "coco_id": TRAIN, "flickr_id": 1, "url": f"https://x/VG_100K/{VG_COCO}.jpg"},
    ]
    write(root / "image_data.json", known)
    put(root, f"VG_100K_2/{VG}.jpg", f"VG_100K/{VG_COCO}.jpg")
    return root


@pytest.mark.parametrize(
    ("pictures", "questions", "kind"),
    [
        ("images", "questions1.2", "balanced"),
        ("gqa/images", "", "balanced"),
        ("allImages/images", "questions", "all"),
    ],
)
def test_gqa_has_the_questions_of_its_training_split(tmp_path, pictures, questions, kind):
    found = plan("gqa", gqa(tmp_path, questions, kind, pictures))
    assert paths(found) == {f"vg/{n}": f"{pictures}/{n}.jpg" for n in (VG, VG_COCO)}
    (text,) = images(found)[f"vg/{VG}"].texts
    assert (text.kind, text.source, text.id) == ("qa", "gqa", f"0{VG}")
    assert (text.question, text.answer) == (f"Is {VG} here?", "yes")
    assert counts(found) == {"gqa": (2, 2, {"held-out": 3})}


def test_gqa_of_both_kinds_is_the_balanced_questions(tmp_path):
    gqa(tmp_path)
    other = {"1": {"imageId": str(VG), "question": "Is it red?", "answer": "no"}}
    write(tmp_path / "questions1.2/train_all_questions/train_all_questions_0.json", other)
    write(tmp_path / "questions1.2/train_all_questions.json", other)
    assert said(plan("gqa", tmp_path))[f"vg/{VG}"] == [("gqa", f"Is {VG} here? yes")]


@pytest.mark.parametrize("ids", ["image_id", "id"])
def test_visual_genomes_own_questions(tmp_path, ids):
    found = plan("vg-qa", vg(tmp_path, ids))
    assert paths(found) == {f"vg/{VG}": f"VG_100K_2/{VG}.jpg", "coco/9": f"VG_100K/{VG_COCO}.jpg"}
    assert said(found)[f"vg/{VG}"] == [("vg-qa", f"Where is {VG}? Outside.")]
    assert counts(found) == {"vg-qa": (2, 2, {})}


JOINED = [
    ("coco", "Closeup of bins of food."),
    ("coco", "A meal."),
    QUESTION,
    ("gqa", f"Is {VG_COCO} here? yes"),
    ("vg-qa", f"Where is {VG_COCO}? Outside."),
]


def four(where: Sequence[Path]) -> None:
    coco(where[0])
    vqa(where[1])
    gqa(where[2])
    vg(where[3])


def check_four(found: Plan) -> None:
    assert said(found) == {
        "coco/9": JOINED,
        "coco/25": [("coco", "A giraffe.")],
        f"vg/{VG}": [("gqa", f"Is {VG} here? yes"), ("vg-qa", f"Where is {VG}? Outside.")],
    }
    assert paths(found)["coco/9"].endswith("COCO_train2014_000000000009.jpg")
    assert {name: row[:2] for name, row in counts(found).items()} == {
        "coco": (2, 3), "vqa": (1, 1), "gqa": (2, 2), "vg-qa": (2, 2),
    }  # fmt: skip
    assert not set(found.left_out["reason"].to_pylist()) - {"held-out"}
    assert found.record.num_images == 3
    assert found.record.num_texts == 8


def test_an_image_of_four_datasets_is_planned_once_with_all_its_texts(tmp_path):
    four([tmp_path] * 4)
    check_four(plan("coco,vqa,gqa,vg-qa", tmp_path))


@pytest.mark.parametrize("names", [("coco", "vqa", "gqa", "vg-qa"), ("COCO", "VQAv2", "GQA", "VisualGenome")])
def test_one_root_may_have_a_folder_for_each_dataset(tmp_path, names):
    four([tmp_path / name for name in names])
    check_four(plan("coco,vqa,gqa,vg-qa", tmp_path))


def test_every_dataset_may_have_a_root_of_its_own(tmp_path):
    roots = [tmp_path / name for name in "abcd"]
    four(roots)
    check_four(plan("coco,vqa,gqa,vg-qa", roots))
    with pytest.raises(UsageError, match="3 given for --dataset coco,vqa,gqa,vg-qa; give one, or one for each"):
        plan("coco,vqa,gqa,vg-qa", roots[:3])


def test_the_images_may_lie_in_a_further_folder(tmp_path):
    four([tmp_path / "said"] * 4)
    pictures = tmp_path / "pictures"
    for path in [*(tmp_path / "said").rglob("*.jpg")]:
        put(pictures, str(path.relative_to(tmp_path / "said")))
        path.unlink()
    check_four(plan("coco,vqa,gqa,vg-qa", tmp_path / "said", images=pictures))


def test_questions_find_the_images_of_the_dataset_whose_folder_lies_beside_theirs(tmp_path):
    coco(tmp_path / "coco")
    vqa(tmp_path / "vqa")
    gqa(tmp_path / "gqa")
    vg(tmp_path / "vg")
    assert paths(plan("vqa", tmp_path)) == {"coco/9": "train2014/COCO_train2014_000000000009.jpg"}
    for path in (tmp_path / "gqa/images").iterdir():
        path.unlink()
    assert set(paths(plan("gqa", tmp_path))) == {f"vg/{VG}", "coco/9"}


def test_visual_genomes_images_may_be_there_as_cocos_alone(tmp_path):
    four([tmp_path] * 4)
    for folder in ("images", "VG_100K", "VG_100K_2"):
        for path in (tmp_path / folder).iterdir():
            path.unlink()
    assert paths(plan("gqa", tmp_path)) == {"coco/9": "train2014/COCO_train2014_000000000009.jpg"}


def test_a_short_number_is_nobody_elses_image(tmp_path):
    """Visual Genome has a 9.jpg and COCO an image 9, and they are different photographs."""
    coco(tmp_path)
    gqa(tmp_path)
    put(tmp_path, "images/9.jpg", "images/25.jpg")
    (tmp_path / "train2014/COCO_train2014_000000000009.jpg").unlink()
    found = plan("coco,gqa", tmp_path)
    assert left_out(found, "missing") == ["coco/9"]
    assert paths(found)["coco/25"] == "train2014/COCO_train2014_000000000025.jpg"


def test_a_validation_image_of_one_dataset_is_kept_out_of_all(tmp_path):
    four([tmp_path] * 4)
    karpathy(tmp_path, test=(TRAIN,), train=(25,))
    found = plan("coco,vqa,gqa,vg-qa", tmp_path)
    assert set(images(found)) == {"coco/25", f"vg/{VG}"}
    assert "coco/9" not in images(plan("gqa,vg-qa", tmp_path)), "Karpathy's split holds without COCO in the job"
    gqa_val = plan("gqa,vg-qa", tmp_path, splits="val")
    assert set(images(gqa_val)) == {f"vg/{VG_VAL}"}
    questions = json.loads((tmp_path / "questions1.2/val_balanced_questions.json").read_text())
    questions["5"] = {"imageId": str(VG), "question": "Is it?", "answer": "no"}
    write(tmp_path / "questions1.2/val_balanced_questions.json", questions)
    assert f"vg/{VG}" in left_out(plan("coco,vg-qa,gqa", tmp_path), "held-out")


def test_a_copy_of_a_validation_image_is_kept_out_whatever_its_name(tmp_path):
    coco(tmp_path / "a")
    gqa(tmp_path / "b")
    val = (tmp_path / "a/val2014/COCO_val2014_000000000042.jpg").read_bytes()
    (tmp_path / f"b/images/{VG}.jpg").write_bytes(val)
    found = plan("coco,gqa", [tmp_path / "a", tmp_path / "b"])
    assert f"vg/{VG}" in left_out(found, "held-out")
    assert f"vg/{VG}" in images(plan("gqa", tmp_path / "b"))


def test_files_of_the_same_bytes_are_one_image_with_all_texts(tmp_path):
    coco(tmp_path)
    gqa(tmp_path)
    same = (tmp_path / "train2014/COCO_train2014_000000000009.jpg").read_bytes()
    (tmp_path / f"images/{VG_COCO}.jpg").write_bytes(same)
    found = plan("coco,gqa", tmp_path)
    image = images(found)["coco/9"]
    assert image.also == [f"images/{VG_COCO}.jpg"]
    assert [t.source for t in image.texts] == ["coco", "coco", "gqa"]
    assert counts(found)["gqa"] == (2, 2, {"held-out": 3, "duplicate": 1})
    assert (found.record.num_duplicates, found.record.num_images) == (1, 3)
    kept = plan("coco,gqa", tmp_path, duplicates="keep")
    assert kept.record.num_images == 4
    assert kept.record.num_duplicates == 0


# Conceptual Captions and SBU

URLS = [
    "http://a.example/wp/christmas.jpg?w=600&h=400",
    "https://b.example/photo%20one/IMG_2.JPG",
    "http://c.example/3.jpg",
    "http://d.example/show.php?id=4",
]
WORDS = ["a christmas tree", 'photo of a "wooden house', "a café in the evening", "a very typical bus station"]


def cc(root: Path, header: str = "", reverse: bool = False, prefix: str = "") -> Path:
    rows = [(url, text) if reverse else (text, url) for text, url in zip(WORDS, URLS, strict=True)]
    lines = [*([header] if header else []), *map("\t".join, rows)]
    write(root / prefix / "Train_GCC-training.tsv", lines)
    return root


def cc_val(root: Path) -> Path:
    write(root / "Validation_GCC-1.1.0-Validation.tsv", ["author : a life in photography\thttp://v.example/val.jpg"])
    return root


def files_of(scheme: str) -> list[str]:
    sums = [crc32(url.encode()) for url in URLS]
    return {
        "index": [f"{n}.jpg" for n in range(4)],
        "padded": [f"{n:08d}.jpg" for n in range(4)],
        "index_crc32": [f"{n}_{s}" for n, s in enumerate(sums)],  # without an extension, as that downloader writes
        "crc32": [f"{s}.jpg" for s in sums],
        "md5": [f"{hashlib.md5(u.encode()).hexdigest()}.jpg" for u in URLS],
        "sha1": [f"{hashlib.sha1(u.encode()).hexdigest()}.png" for u in URLS],
        "sha256": [f"{hashlib.sha256(u.encode()).hexdigest()}.webp" for u in URLS],
        "basename": ["christmas.jpg", "IMG_2.JPG", "3.jpg", "show.php"],
    }[scheme]


@pytest.mark.parametrize("folder", ["training", "cc3m/images"])
@pytest.mark.parametrize("scheme", ["index", "padded", "index_crc32", "crc32", "md5", "sha1", "sha256", "basename"])
def test_conceptual_captions_as_folders_of_images_under_every_name_in_use(tmp_path, scheme, folder):
    names = files_of(scheme)[:3]
    put(cc_val(cc(tmp_path)), *(os.path.join(folder, n) for n in names))
    found = plan("cc", tmp_path)
    assert paths(found) == {f"cc/{n}": os.path.join(folder, name) for n, name in enumerate(names)}
    assert said(found) == {f"cc/{n}": [("cc", WORDS[n])] for n in range(3)}
    assert counts(found) == {"cc": (3, 3, {"held-out": 1, "missing": 1, "text-without-image": 1})}
    assert left_out(found, "held-out") == ["cc/val-0"]


@pytest.mark.parametrize(
    ("header", "reverse"), [("", False), ("caption\turl", False), ("url\tcaption", True), ("", True)]
)
def test_the_list_may_have_a_header_and_either_order(tmp_path, header, reverse):
    put(cc(tmp_path, header, reverse, prefix="lists"), *files_of("index"))
    assert said(plan("cc", tmp_path)) == {f"cc/{n}": [("cc", WORDS[n])] for n in range(4)}


def test_a_lucky_hit_of_one_way_of_naming_does_not_hide_the_others(tmp_path):
    """Row 2's URL ends in 3.jpg, but 3.jpg is row 3, as in 0.jpg, 1.jpg and 2.jpg."""
    put(cc(tmp_path), *(f"images/{n}" for n in files_of("index")))
    assert paths(plan("cc", tmp_path))["cc/2"] == "images/2.jpg"


def test_validation_rows_have_numbers_of_their_own(tmp_path):
    put(cc_val(cc(tmp_path)), *(f"training/{n}.jpg" for n in range(4)), "validation/0.jpg")
    found = plan("cc", tmp_path, splits="train,val")
    assert paths(found) == {
        **{f"cc/{n}": f"training/{n}.jpg" for n in range(4)},
        "cc/val-0": "validation/0.jpg",
    }
    (tmp_path / "Train_GCC-training.tsv").unlink()
    assert paths(plan("cc", tmp_path, splits="val")) == {"cc/val-0": "validation/0.jpg"}


def test_rows_of_two_lists_never_share_an_id(tmp_path):
    cc(tmp_path)
    write(tmp_path / "Train_GCC-training_part2.tsv", ["a second list\thttp://e.example/second.jpg"])
    put(tmp_path, "images/christmas.jpg", "images/second.jpg")
    found = plan("cc", tmp_path)
    assert sorted(texts for texts in said(found).values()) == [[("cc", WORDS[0])], [("cc", "a second list")]]


def test_a_url_of_two_rows_is_one_image_with_both_captions(tmp_path):
    write(tmp_path / "cc3m.tsv", [f"one\t{URLS[0]}", f"two\t{URLS[0]}"])
    put(tmp_path, f"images/{hashlib.md5(URLS[0].encode()).hexdigest()}.jpg")
    assert said(plan("cc", tmp_path)) == {"cc/0": [("cc", "one"), ("cc", "two")]}


def test_broken_lines_are_reported_and_other_tables_left_alone(tmp_path):
    cc(tmp_path)
    with (tmp_path / "Train_GCC-training.tsv").open("a") as file:
        file.write("no url at all\nthree\tcells\there\n")
    write(tmp_path / "features.tsv", ["1\t2\tabcd", "2\t3\tefgh"])
    put(tmp_path, *files_of("md5"))
    found = plan("cc", tmp_path)
    assert found.record.num_images == 4
    assert counts(found)["cc"][2] == {"malformed-row": 2}


def tar(path: Path, contents: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if form == tarfile.PAX_FORMAT:
                member.mtime = 1.5  # gives every member a header of its own
            archive.addfile(member, io.BytesIO(data))
    return path


def img2dataset(
    root: Path, urls: Sequence[str] = URLS, texts: Sequence[str] = WORDS, form: int = tarfile.USTAR_FORMAT,
    sidecars: str = "txt json", files: bool = False, dead: Sequence[int] = (3,), shard: int = 0,
) -> Path:  # fmt: skip
    """What img2dataset writes for one shard, in its formats webdataset and files."""
    name, contents = f"{shard:05d}", {}
    keys = [f"{name}{n:04d}" for n in range(len(urls))]
    for n, key in enumerate(keys):
        if n not in dead:
            contents[f"{key}.jpg"] = f"{root}{key}".encode()
            about = {"url": urls[n], "caption": texts[n], "key": key, "status": "success", "width": 8}
            more = {"txt": texts[n], "json": json.dumps(about)}
            contents |= {f"{key}.{e}": more[e].encode() for e in sidecars.split()}
    if files:
        for member, data in contents.items():
            put(root, f"{name}/{member}")
            (root / name / member).write_bytes(data)
    else:
        tar(root / f"{name}.tar", contents, form)
    columns = {
        "url": urls,
        "key": keys,
        "status": ["failed_to_download" if n in dead else "success" for n in range(len(urls))],
        "error_message": ["HTTP Error 404: Not Found" if n in dead else None for n in range(len(urls))],
        "caption": texts,
        "width": [None if n in dead else 8 for n in range(len(urls))],
    }
    write(root / f"{name}.parquet", pa.table({k: list(v) for k, v in columns.items()}))
    write(root / f"{name}_stats.json", {"count": 4, "successes": 3, "failed_to_download": 1, "status_dict": {}})
    return root


@pytest.mark.parametrize("listed", [True, False], ids=["with the list", "without it"])
@pytest.mark.parametrize(
    ("form", "sidecars", "files"),
    [
        (tarfile.USTAR_FORMAT, "txt json", False),
        (tarfile.PAX_FORMAT, "txt json", False),
        (tarfile.GNU_FORMAT, "json", False),
        (tarfile.USTAR_FORMAT, "txt", False),
        (tarfile.USTAR_FORMAT, "", False),
        (tarfile.USTAR_FORMAT, "txt json", True),
        (tarfile.USTAR_FORMAT, "", True),
    ],
)
def test_img2datasets_output_has_images_captions_and_dead_links(tmp_path, listed, form, sidecars, files):
    img2dataset(tmp_path / "cc3m", form=form, sidecars=sidecars, files=files)
    if listed:
        cc_val(cc(tmp_path))
    found = plan("cc", tmp_path if listed else tmp_path / "cc3m")
    assert sorted(texts for texts in said(found).values()) == sorted([("cc", text)] for text in WORDS[:3])
    assert (found.record.num_images, found.record.num_missing) == (3, 1)
    held_out = {"held-out": 1} if listed else {}
    assert counts(found) == {"cc": (3, 3, {"dead-link": 1, "text-without-image": 1, **held_out})}
    (gone,) = [r for r in found.left_out.to_pylist() if r["reason"] == "dead-link"]
    assert "404" in gone["message"]
    for name in images(found):
        assert content(found, name).startswith(str(tmp_path).encode())


def test_a_folder_of_img2datasets_tars_needs_no_dataset(tmp_path):
    for shard in range(2):
        img2dataset(tmp_path, shard=shard, urls=[f"{u}#{shard}" for u in URLS])
    found = plan(images=tmp_path, source="web")
    assert said(found)["web/00001/000010002"] == [("web", WORDS[2])]
    assert counts(found) == {"web": (6, 6, {"dead-link": 2, "text-without-image": 2})}
    assert images(found)["web/00000/000000000"].key == "00000%2F000000000"
    assert content(found, "web/00001/000010002") == f"{tmp_path}000010002".encode()
    alone = plan(images=tmp_path / "00000.tar")
    assert alone.record.num_images == 3


@pytest.mark.parametrize("cut", ["in an image", "in a header", "between two members", "overwritten"])
def test_of_a_damaged_tar_the_images_before_the_damage_are_used(tmp_path, cut):
    contents = {f"{n}.{e}": f"{n}{e}".encode() * 600 for n in range(3) for e in ("jpg", "txt")}
    path = tar(tmp_path / "00000.tar", contents)
    with tarfile.open(path) as archive:
        start = archive.getmember("2.jpg").offset
    data = path.read_bytes()
    if cut == "overwritten":
        path.write_bytes(data[:start] + b"\xff" * 512 + data[start + 512 :])
    else:
        path.write_bytes(data[: start + {"in an image": 700, "in a header": 100, "between two members": 0}[cut]])
    found = plan(images=tmp_path)
    assert list(paths(found).values()) == ["00000.tar/0.jpg", "00000.tar/1.jpg"]
    assert left_out(found, "damaged-tar") == ["00000.tar"]
    assert found.record.num_missing == 1


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_is_read_as_tarfile_reads_it(tmp_path, form):
    names = ["a.jpg", "folder/" * 12 + "b.jpg", "x" * 60 + "/" + "y" * 70 + ".jpg"]
    if form != tarfile.USTAR_FORMAT:
        names += ["n" * 300 + ".jpg", "\u5199\u771f" * 40 + ".png", "caf\udce9.jpg"]
    path = tar(tmp_path / "x.tar", {name: name.encode("utf-8", "surrogateescape") * 99 for name in names}, form)
    with tarfile.open(path, "a", format=form) as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("other.jpg")
            member.type, member.linkname, member.size = kind, "a.jpg", 7
            archive.addfile(member)
        archive.addfile(tarfile.TarInfo("last.jpg"))
    with tarfile.open(path) as archive, Window(path) as file:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
        assert [(m.name, m.data, m.size) for m in members(file, foreign=True)] == expected
        assert [name for name, _, _ in expected] == [*names, "last.jpg"]


def test_a_tar_that_is_none_is_reported_and_hidden_members_are_no_images(tmp_path):
    write(tmp_path / "a.tar", "<html>404</html>")
    tar(tmp_path / "b.tar", {"0.jpg": b"zero", "._0.jpg": b"\0\5\26\7", "x/.hidden.png": b"hidden"})
    found = plan(images=tmp_path)
    assert list(paths(found).values()) == ["b.tar/0.jpg"]
    assert left_out(found, "damaged-tar") == ["a.tar"]


def sbu(root: Path, form: str) -> Path:
    urls = ["http://static.flickr.com/2723/4385058960_b0f291553e.jpg", "http://static.flickr.com/1/2_gone.jpg"]
    texts = ["A wooden chair\u2028in the living\x85room", "The view"]
    if form == "txt":
        write(root / "dataset/SBU_captioned_photo_dataset_urls.txt", urls)
        write(root / "dataset/SBU_captioned_photo_dataset_captions.txt", texts)
    else:
        everything = {"image_urls": urls, "captions": texts, "user_ids": ["47889917@N08", "1"]}
        write(root / "sbu-captions-all.json", everything)
        write(root / "sbu_stats.json", {"count": 2})
    return root


@pytest.mark.parametrize("form", ["txt", "json"])
@pytest.mark.parametrize("name", ["images/4385058960_b0f291553e.jpg", "sbu_images/0.jpg", "000000.png"])
def test_sbu_as_two_lists_or_one_file(tmp_path, form, name):
    put(sbu(tmp_path, form), name)
    found = plan("sbu", tmp_path)
    assert paths(found) == {"sbu/0": name}
    assert said(found) == {"sbu/0": [("sbu", "A wooden chair\u2028in the living\x85room")]}
    assert counts(found) == {"sbu": (1, 1, {"missing": 1, "text-without-image": 1})}


def test_sbu_lists_of_different_lengths_are_an_error(tmp_path):
    sbu(tmp_path, "txt")
    with (tmp_path / "dataset/SBU_captioned_photo_dataset_urls.txt").open("a") as file:
        file.write("http://one.more\n")
    with pytest.raises(UsageError, match=r"_urls.txt has 3 lines, .*_captions.txt 2"):
        plan("sbu", tmp_path)


def test_sbu_and_cc_in_one_root_do_not_take_each_others_images(tmp_path):
    cc(sbu(tmp_path, "json"))
    put(tmp_path, "sbu/0.jpg", "sbu/1.jpg", "cc3m/0.jpg", "cc3m/3.jpg", "images/2.jpg")
    found = plan("cc,sbu", tmp_path)
    assert paths(found) == {
        "cc/0": "cc3m/0.jpg", "cc/3": "cc3m/3.jpg", "sbu/0": "sbu/0.jpg", "sbu/1": "sbu/1.jpg",
    }  # fmt: skip


# Flickr30k and Flickr8k

FLICKR = ["1000092795", "10002456", "36979"]


def flickr_lines(names: Sequence[str]) -> list[str]:
    return [f"{name}.jpg#{n}\tCaption {n} of {name} ." for name in names for n in range(5)]


def flickr30k(root: Path, pictures: str = "flickr30k-images") -> Path:
    write(root / "results_20130124.token", flickr_lines(FLICKR))
    put(root, *(f"{pictures}/{name}.jpg" for name in FLICKR))
    return root


@pytest.mark.parametrize("pictures", ["flickr30k-images", "flickr30k_images", "images", "flickr30k-images/images"])
def test_flickr30k_has_five_captions_an_image(tmp_path, pictures):
    found = plan("flickr30k", flickr30k(tmp_path, pictures))
    assert paths(found)["flickr30k/36979"] == f"{pictures}/36979.jpg"
    texts = images(found)["flickr30k/36979"].texts
    assert [(t.id, t.text) for t in texts] == [(f"36979.jpg#{n}", f"Caption {n} of 36979 .") for n in range(5)]
    assert counts(found) == {"flickr30k": (3, 15, {})}


def flickr_karpathy(root: Path) -> None:
    listed = [
        {"filename": f"{n}.jpg", "imgid": k, "split": s, "sentences": [{"raw": f"K {n}", "sentid": k, "tokens": []}]}
        for k, (n, s) in enumerate(zip(FLICKR, ("train", "val", "test"), strict=True))
    ]
    write(root / "dataset_flickr30k.json", {"images": listed, "dataset": "flickr30k"})


@pytest.mark.parametrize("form", ["karpathy", "entities", "entities in a folder"])
def test_flickr30ks_validation_and_test_images_are_kept_out(tmp_path, form):
    flickr30k(tmp_path)
    if form == "karpathy":
        flickr_karpathy(tmp_path)
    else:
        for name, split in zip(FLICKR, ("train", "val", "test"), strict=True):
            write(tmp_path / ("flickr30k_entities" if "folder" in form else "") / f"{split}.txt", [name])
            write(tmp_path / f"Sentences/{name}.txt", ["[/EN#1/people Two people] stand"])
    assert counts(plan("flickr30k", tmp_path)) == {"flickr30k": (1, 5, {"held-out": 2})}


def test_karpathys_flickr30k_alone_has_the_captions(tmp_path):
    flickr30k(tmp_path)
    flickr_karpathy(tmp_path)
    (tmp_path / "results_20130124.token").unlink()
    assert said(plan("flickr30k", tmp_path)) == {"flickr30k/1000092795": [("flickr30k", "K 1000092795")]}


def test_flickr30k_as_kaggle_has_it(tmp_path):
    lines = ["image_name| comment_number| comment"]
    lines += [f"{name}.jpg| {n}| Two, of {name} | {n} ." for name in FLICKR for n in range(5)]
    lines[-1] = f"{FLICKR[-1]}.jpg| 4   A dog runs across the grass ."  # sic, of 2199200615.jpg
    write(tmp_path / "flickr30k_images/results.csv", lines)
    put(tmp_path, *(f"flickr30k_images/flickr30k_images/{name}.jpg" for name in FLICKR))
    found = plan("flickr30k", tmp_path)
    assert counts(found) == {"flickr30k": (3, 15, {})}
    texts = images(found)["flickr30k/36979"].texts
    assert [t.text for t in texts[3:]] == ["Two, of 36979 | 3 .", "A dog runs across the grass ."]
    assert texts[4].id == "36979.jpg#4"


def test_flickr8k_in_its_own_layout(tmp_path):
    names = ["1000268201_693b08cb0e", "1001773457_577c3a7d70", "1002674143_1b742ab4b8"]
    write(tmp_path / "Flickr8k_text/Flickr8k.token.txt", flickr_lines(names))
    write(tmp_path / "Flickr8k_text/Flickr8k.lemma.token.txt", flickr_lines(names))
    for split, name in zip(("train", "dev", "test"), names, strict=True):
        write(tmp_path / f"Flickr8k_text/Flickr_8k.{split}Images.txt", [f"{name}.jpg"])
    put(tmp_path, *(f"Flickr8k_Dataset/Flicker8k_Dataset/{name}.jpg" for name in names))
    assert counts(plan("flickr30k", tmp_path)) == {"flickr30k": (1, 5, {"held-out": 2})}


def test_flickr8k_as_kaggle_has_it(tmp_path):
    write(tmp_path / "captions.txt", ["image,caption", '1_a.jpg,"A child, in pink ."', "1_a.jpg,A girl .", "2_b.jpg,B"])
    put(tmp_path, "Images/1_a.jpg", "Images/2_b.jpg")
    found = said(plan("flickr30k", tmp_path))
    assert found["flickr30k/1_a"] == [("flickr30k", "A child, in pink ."), ("flickr30k", "A girl .")]


# All at once


def all_seven(root: Path) -> Path:
    four([root] * 4)
    img2dataset(cc_val(cc(root)) / "cc")
    put(sbu(root, "txt"), "sbu/4385058960_b0f291553e.jpg")
    return flickr30k(root)


SEVEN = "coco,cc,sbu,flickr30k,gqa,vqa,vg-qa"


def test_seven_datasets_in_one_root(tmp_path):
    found = plan(SEVEN, all_seven(tmp_path))
    assert {name: row[:2] for name, row in counts(found).items()} == {
        "coco": (2, 3), "cc": (3, 3), "sbu": (1, 1), "flickr30k": (3, 15), "gqa": (2, 2), "vqa": (1, 1), "vg-qa": (2, 2)
    }  # fmt: skip
    assert (found.record.num_images, found.record.num_texts) == (10, 27)
    assert [name.partition("/")[0] for name in images(found)] == ["coco"] * 2 + ["cc"] * 3 + ["sbu"] + [
        "flickr30k"
    ] * 3 + ["vg"]
    assert len(set(found.table["key"].to_pylist())) == 10
    for name in images(found):
        assert content(found, name)


def test_datasets_may_be_named_one_by_one_and_in_pipelines_yaml(tmp_path):
    coco(tmp_path / "a")
    put(tmp_path / "own", "x.jpg")
    write(tmp_path / "own.tsv", ["x.jpg\tMine."])
    entries = {
        "mine": Dataset(images=str(tmp_path / "own"), captions=str(tmp_path / "own.tsv")),
        "pictures": Dataset(layout="coco", root=str(tmp_path / "a")),
    }
    asked = Extract(dataset=["pictures", "mine"])
    found = plan_of(make_request(asked, Catalog(datasets=entries)), asked)
    assert said(found)["mine/x"] == [("own", "Mine.")]
    assert {"coco/9", "mine/x"} <= set(images(found))
    coco(tmp_path / "b")
    (tmp_path / "b/train2014/COCO_train2014_000000000009.jpg").unlink()
    assert "coco/9" not in images(plan("pictures", tmp_path / "b", Catalog(datasets=entries))), "flags win"
    with pytest.raises(UsageError, match="did you mean 'coco'"):
        plan("cocoo", tmp_path)


# Lists of images to keep out


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("x.txt", ["coco/9"]),
        ("x.txt", ["9", ""]),
        ("x.txt", ["000000000009"]),
        ("x.txt", ["COCO_train2014_000000000009.jpg"]),
        ("x.txt", ["000000000009.jpg"]),
        ("x.txt", ["train2014/COCO_train2014_000000000009.jpg"]),
        ("x.txt", [f"vg/{VG_COCO}"]),
        ("x.txt", [f"{VG_COCO}.jpg"]),
        ("x.csv", ["image,caption", "COCO_train2014_000000000009.jpg,no"]),
        ("x.tsv", ["9\tno"]),
        ("x.json", [9]),
        ("x.json", ["coco/9"]),
        ("x.json", [{"image_id": 9}]),
        ("x.json", {"images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg"}]}),
        ("x.json", {"images": [{"id": 9, "file_name": "000000000009.jpg"}], "annotations": []}),
        ("x.json", {"train": [25], "val": [9], "test": []}),
        ("x.json", {"images": [{"cocoid": n, "split": s, "filename": ""} for n, s in ((9, "test"), (25, "restval"))]}),
    ],
)
def test_an_image_is_excluded_by_any_of_its_names(tmp_path, name, listed):
    four([tmp_path / "data"] * 4)
    found = plan("coco,vqa,gqa,vg-qa", tmp_path / "data", exclude=[str(write(tmp_path / name, listed))])
    assert left_out(found, "excluded") == ["coco/9"]
    assert set(images(found)) == {"coco/25", f"vg/{VG}"}


def test_urls_paths_and_copies_are_excluded_too_and_lists_add_up(tmp_path):
    put(cc(tmp_path / "cc"), *files_of("md5"))
    (tmp_path / "cc" / files_of("md5")[3]).write_bytes((tmp_path / "cc" / files_of("md5")[0]).read_bytes())
    lists = [write(tmp_path / "a.txt", [URLS[0]]), write(tmp_path / "b.txt", [files_of("md5")[1]])]
    found = plan("cc", tmp_path / "cc", exclude=[str(path) for path in lists])
    assert left_out(found, "excluded") == ["cc/0", "cc/1", "cc/3"]
    for name, text, message in (("c.txt", "", "no name in it"), ("d.json", "{", "cannot be read")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=message):
            plan("cc", tmp_path / "cc", exclude=[str(tmp_path / name)])


# Ids and keys

ODD = [
    "a.b.c.jpg",
    "a.b.jpg",
    "a/b.jpg",
    "a b.jpg",
    "a%20b.jpg",
    "ünï/写真.jpg",
    "a_b.jpg",
    "new\nline.jpg",
    "a%2Fb.png",
]


def test_odd_names_survive_and_keys_never_collide(tmp_path):
    found = plan(images=put(tmp_path, *ODD), source="own")
    assert {i.path: i.id for i in images(found).values()} == {name: name.rpartition(".")[0] for name in ODD}
    assert {i.source for i in images(found).values()} == {"own"}
    keys = found.table["key"].to_pylist()
    assert len(set(keys)) == len(ODD)
    assert all(re.fullmatch(r"[A-Za-z0-9_%-]+", key) for key in keys)


# Manifests

ROWS = [
    {"path": "a/1.jpg", "text": "One.", "source": "web"},
    {"path": "a/1.jpg", "text": "Uno.", "source": "web"},
    {"path": "./b.jpg", "text": "Two.", "source": None},
    {"path": None, "text": "Nobody's.", "source": "web"},
    {"path": "c d.jpg", "text": None, "source": "web"},
]


def manifest(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".parquet":
        return write(path, pa.table({n: [row.get(n) for row in rows] for n in names}))
    if path.suffix == ".jsonl":
        return write(path, map(json.dumps, rows))
    mark = "," if path.suffix == ".csv" else "\t"
    return write(path, [mark.join(names), *(mark.join(str(row.get(n) or "") for n in names) for row in rows)])


FORMS = pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet"])


@FORMS
def test_a_manifest_names_images_and_texts(tmp_path, form):
    put(tmp_path, "a/1.jpg", "b.jpg", "c d.jpg")
    found = plan(images=manifest(tmp_path / f"own.{form}", ROWS))
    assert said(found) == {"web/a/1": [("web", "One."), ("web", "Uno.")], "own/b": [("own", "Two.")], "web/c d": []}
    assert counts(found) == {"web": (2, 2, {"text-without-image": 1}), "own": (1, 1, {})}
    assert [t.id for t in images(found)["web/a/1"].texts] == ["0", "1"]
    assert content(found, "own/b") == f"{tmp_path}/b.jpg".encode()


@FORMS
def test_a_manifest_may_have_questions_and_absolute_paths(tmp_path, form):
    put(tmp_path / "else where", "x.jpg")
    there = str(tmp_path / "else where/x.jpg")
    rows = [
        {"path": there, "question": "Is it?", "answer": "yes", "text": None},
        {"path": there, "question": None, "answer": None, "text": "It is."},
    ]
    (image,) = planned_images(plan(images=manifest(tmp_path / f"m.{form}", rows)).table)
    assert image.path == there
    assert [(t.kind, t.question, t.answer, t.text) for t in image.texts] == [
        ("qa", "Is it?", "yes", None),
        ("caption", None, None, "It is."),
    ]


@FORMS
def test_a_manifest_without_texts_is_images_alone(tmp_path, form):
    put(tmp_path, "1.jpg", "2.jpg")
    found = plan(images=manifest(tmp_path / f"m.{form}", [{"path": "1.jpg"}, {"path": "2.jpg"}]))
    assert said(found) == {"m/1": [], "m/2": []}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_row_may_have_several_texts(tmp_path, form):
    put(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    rows = [{"image": "1.jpg", "captions": ["One.", "Uno."]}, {"image": "2.jpg", "captions": []}, {"image": "3.jpg"}]
    found = plan(images=manifest(tmp_path / f"m.{form}", rows))
    assert said(found) == {"m/1": [("m", "One."), ("m", "Uno.")], "m/2": [], "m/3": []}
    assert [t.id for t in images(found)["m/1"].texts] == ["0", "0-1"]


@FORMS
def test_a_manifest_gives_ids_and_sources_of_any_form(tmp_path, form):
    put(tmp_path, "x/1.jpg", "x/2.jpg")
    rows = [{"path": "x/1.jpg", "id": "a/b.c", "source": "s/1"}, {"path": "x/2.jpg", "id": "7", "source": "s/1"}]
    found = plan(images=manifest(tmp_path / f"m.{form}", rows))
    assert list(images(found)) == ["s_1/a/b.c", "s_1/7"]
    rows[1]["id"] = "a/b.c"
    with pytest.raises(UsageError, match=r"share the id"):
        plan(images=manifest(tmp_path / f"m.{form}", rows))


@FORMS
def test_a_manifest_without_paths_is_an_error(tmp_path, form):
    with pytest.raises(UsageError, match="needed is"):
        plan(images=manifest(tmp_path / f"m.{form}", [{"url": "u", "text": "t"}]))
    with pytest.raises(UsageError, match=r"no row of it names an image|cannot be read"):
        plan(
            images=write(
                tmp_path / f"m.{form}", pa.table({"path": pa.nulls(0, pa.string())}) if form == "parquet" else ""
            )
        )


def test_a_lone_quotation_mark_in_a_manifest_swallows_nothing(tmp_path):
    put(tmp_path, "1.jpg", "2.jpg")
    path = write(tmp_path / "m.tsv", ["path\ttext", '1.jpg\t"Hi, he said', "2.jpg\tA room."])
    assert said(plan(images=path))["m/2"] == [("m", "A room.")]


# Encodings, line ends and quotation marks of all of them

WRITTEN = ['"Hello," he said', 'a 5" screen', '"a 5" screen"', "l'été\u2028au \u0085caf\xe9"]
ENCODED = pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
ENDED = pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])


def recode(path: Path, encoding: str, end: str = "\n") -> None:
    path.write_bytes(path.read_bytes().decode().replace("\n", end).encode(encoding))


@ENCODED
@ENDED
@pytest.mark.parametrize("reverse", [False, True])
def test_conceptual_captions_keep_their_quotation_marks(tmp_path, encoding, end, reverse):
    rows = [(f"http://x/{n}.jpg", text) for n, text in enumerate(WRITTEN)]
    listed = write(tmp_path / "Train_GCC-training.tsv", ("\t".join(row[::-1] if reverse else row) for row in rows))
    recode(listed, encoding, end)
    put(tmp_path, *(f"{n}.jpg" for n in range(len(WRITTEN))))
    assert [text for ((_, text),) in said(plan("cc", tmp_path)).values()] == WRITTEN


@ENCODED
@ENDED
def test_sbus_lists_keep_their_quotation_marks(tmp_path, encoding, end):
    urls = write(tmp_path / "SBU_captioned_photo_dataset_urls.txt", [f"http://x/{n}.jpg" for n in range(len(WRITTEN))])
    recode(urls, "utf-8", end)
    recode(write(tmp_path / "SBU_captioned_photo_dataset_captions.txt", WRITTEN), encoding, end)
    put(tmp_path, *(f"{n}.jpg" for n in range(len(WRITTEN))))
    assert [text for ((_, text),) in said(plan("sbu", tmp_path)).values()] == WRITTEN


@ENCODED
@ENDED
@pytest.mark.parametrize("name", ["results_20130124.token", "results.csv", "captions.txt"])
def test_flickr30k_keeps_its_quotation_marks(tmp_path, encoding, end, name):
    mark = {"results.csv": "| ", "captions.txt": ","}.get(name, "\t")
    header = {"results.csv": ["image_name| comment"], "captions.txt": ["image,caption"]}.get(name, [])
    texts = [json.dumps(t, ensure_ascii=False).replace('\\"', '""') for t in WRITTEN] if mark == "," else WRITTEN
    hash_ = "#0" if ".token" in name else ""
    listed = write(tmp_path / name, [*header, *(f"{n}.jpg{hash_}{mark}{text}" for n, text in enumerate(texts))])
    recode(listed, encoding, end)
    recode(write(tmp_path / "test.txt", ["3.jpg"]), encoding, end)
    put(tmp_path, *(f"{n}.jpg" for n in range(len(WRITTEN))))
    assert [text for ((_, text),) in said(plan("flickr30k", tmp_path)).values()] == WRITTEN[:3]


def test_flickr_captions_with_commas_but_no_quotes_are_whole_and_quotes_may_span_lines(tmp_path):
    rows = ["image_name,comment_number,comment", "1.jpg,0, Two, three , and four .", '2.jpg,0,"one', 'two"']
    put(tmp_path, "1.jpg", "2.jpg")
    write(tmp_path / "captions.txt", rows)
    assert list(said(plan("flickr30k", tmp_path)).values()) == [
        [("flickr30k", "Two, three , and four .")],
        [("flickr30k", "one\ntwo")],
    ]


@ENCODED
@ENDED
@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv"])
def test_a_manifest_keeps_its_quotation_marks(tmp_path, encoding, end, form):
    rows = [{"path": f"{n}.jpg", "text": text} for n, text in enumerate(WRITTEN)]
    if form == "csv":
        rows = [row | {"text": '"' + str(row["text"]).replace('"', '""') + '"'} for row in rows]
    recode(manifest(tmp_path / f"m.{form}", rows), encoding, end)
    put(tmp_path, *(f"{n}.jpg" for n in range(len(WRITTEN))))
    assert [text for ((_, text),) in said(plan(images=tmp_path / f"m.{form}")).values()] == WRITTEN


@ENCODED
@ENDED
@pytest.mark.parametrize(
    ("name", "listed"),
    [("x.txt", ["b.jpg", "c,d.jpg"]), ("x.csv", ["b.jpg", '"c,d.jpg",2']), ("x.tsv", ["b.jpg", '"c,d.jpg"\t2'])],
)
def test_lists_of_excluded_images_are_read_alike(tmp_path, encoding, end, name, listed):
    recode(write(tmp_path / name, listed), encoding, end)
    put(tmp_path / "images", "a.jpg", "b.jpg", "c,d.jpg")
    found = plan(images=tmp_path / "images", exclude=[str(tmp_path / name)])
    assert list(images(found)) == ["images/a"]


@pytest.mark.parametrize(
    ("dataset", "name", "content"),
    [
        ("cc", "Train_GCC-training.tsv", "A cat.\thttp://x/1.jpg\ncafé\thttp://x/2.jpg\n"),
        ("sbu", "SBU_captioned_photo_dataset_captions.txt", "A cat.\ncafé\n"),
        ("sbu", "sbu-captions-all.json", '{"image_urls": [],\n "captions": ["café"]}'),
        ("flickr30k", "results_20130124.token", "1.jpg#0\tA cat.\n1.jpg#1\tcafé\n"),
        ("flickr30k", "results.csv", "image_name| comment\n1.jpg| café\n"),
        ("flickr30k", "train.txt", "1.jpg\ncafé.jpg\n"),
        ("coco", "captions_train2014.json", '{"images":\n["café"]}'),
        ("", "m.jsonl", '{"path": "1.jpg"}\n{"path": "café.jpg"}'),
        ("", "m.csv", "path,text\n1.jpg,café\n"),
        ("", "m.tsv", "path\ttext\n1.jpg\tcafé\n"),
        ("", "x.txt", "1.jpg\ncafé\n"),
        ("", "x.json", '[\n"café"]'),
    ],
)
def test_other_encodings_are_refused_with_the_line_and_what_to_do(tmp_path, dataset, name, content):
    put(tmp_path, "1.jpg")
    if name.startswith("SBU"):
        write(tmp_path / "SBU_captioned_photo_dataset_urls.txt", ["http://x/1.jpg", "http://x/2.jpg"])
    (tmp_path / name).write_bytes(content.encode("latin1"))
    ways = {
        "x": lambda: plan(images=tmp_path, exclude=[str(tmp_path / name)]),
        "m": lambda: plan(images=tmp_path / name),
    }
    with pytest.raises(UsageError, match=rf"^--\w+ {tmp_path / name}: line 2 is not UTF-8 .*: iconv -f lat") as error:
        ways.get(name[0], lambda: plan(dataset, tmp_path))()
    assert len(error.value.message.splitlines()) == 1


def test_a_text_beside_an_image_in_a_tar_is_read_or_named_never_altered(tmp_path):
    photos = {f"{n}.jpg": f"{tmp_path}{n}".encode() for n in range(5)}
    texts = {"0.txt": "\ufeffcafé".encode(), "1.txt": "café".encode("utf-16"), "2.txt": "café".encode("latin1"),
             "3.json": '{"caption": "café"}'.encode("latin1"), "4.json": '{"caption": "café"}'.encode()}  # fmt: skip
    tar(tmp_path / "a.tar", dict(sorted((photos | texts).items())))
    found = plan(images=tmp_path)
    assert [text for texts in said(found).values() for _, text in texts] == ["café"] * 3
    assert left_out(found, "encoding") == ["a.tar/2.jpg", "a.tar/3.jpg"]
    messages = [r["message"] for r in found.left_out.to_pylist() if r["reason"] == "encoding"]
    assert messages[0] == "its .txt file: line 1 is not UTF-8 (byte 0xe9 after 'caf'); it may be Latin-1"
    given = write(tmp_path / "c.tsv", ["a/2.jpg\tA cat."])
    assert left_out(plan(images=tmp_path, captions=given), "encoding") == []


def test_a_text_file_beside_an_image_is_read_or_refused_by_name(tmp_path):
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "a.txt").write_bytes("café\rtwo\r".encode("utf-16"))
    (tmp_path / "b.txt").write_bytes('"One," he said\u2028on\r\n'.encode("utf-8-sig"))
    found = [text for texts in said(plan(images=tmp_path, captions="txt")).values() for _, text in texts]
    assert found == ["café", "two", '"One," he said\u2028on']
    (tmp_path / "c.txt").write_bytes(b"one\ncaf\xe9")
    with pytest.raises(UsageError, match=r"^--captions .*/c.txt: line 2 is not UTF-8 .*: iconv "):
        plan(images=tmp_path, captions="txt")


# The order, the shards, and a plan that lies there already


def test_limit_takes_the_first_and_a_seed_shuffles(tmp_path):
    put(tmp_path, *(f"{n:03d}.jpg" for n in range(50)))
    in_order = list(images(plan(images=tmp_path, source="s")))
    assert in_order == [f"s/{n:03d}" for n in range(50)]
    assert list(images(plan(images=tmp_path, source="s", limit=7))) == in_order[:7]
    shuffled = list(images(plan(images=tmp_path, source="s", shuffle_seed=1)))
    assert sorted(shuffled) == in_order != shuffled
    assert list(images(plan(images=tmp_path, source="s", shuffle_seed=1, limit=7))) == shuffled[:7]
    assert list(images(plan(images=tmp_path, source="s", shuffle_seed=2))) != shuffled


@pytest.mark.parametrize("size", [1, 3, 300, 1000, 5000])
def test_a_shards_part_of_a_stored_plan_is_what_was_planned(tmp_path, size):
    rows = [{"path": f"{n:04d}.jpg", "text": f"Text {n}"} for n in range(2050)]
    made = plan(images=manifest(tmp_path / "m.jsonl", rows), images_per_shard=size)
    store(tmp_path, made)
    everything = planned_images(made.table)
    assert made.record.num_shards == -(-2050 // size)
    for number in {0, 1, 2, made.record.num_shards // 2, made.record.num_shards - 1}:
        if number < made.record.num_shards:
            roots, found = read_shard_plan(tmp_path, number, NO_CACHE)
            assert found == everything[number * size : (number + 1) * size]
            assert len(found) == made.record.images_in(number)
            assert roots == made.roots


def test_a_stored_plan_is_used_again_until_an_input_changes(tmp_path):
    data, out = all_seven(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    excluded = write(tmp_path / "excluded.txt", ["coco/25"])

    def again(**changed: object) -> tuple[Plan, bool]:
        options = {"out": str(out), "exclude": [str(excluded)], "splits": "train,val", **changed}
        found = plan(SEVEN, data, **options)
        is_stored = not len(found.table)
        if not is_stored:
            store(out, found)
        return found, is_stored

    first, was_stored = again()
    assert not was_stored
    second, was_stored = again()
    assert was_stored
    assert (second.record, second.counts, second.roots) == (first.record, first.counts, first.roots)
    assert read_shard_plan(out, 0, NO_CACHE) == (first.roots, planned_images(first.table))
    changes = {
        "a seed": {"shuffle_seed": 3},
        "a limit": {"limit": 2},
        "splits": {"splits": "train"},
        "the shards": {"images_per_shard": 2},
    }
    for what, change in changes.items():
        assert not again(**change)[1], what
    assert not again()[1]
    edits = {
        "a new image": lambda: put(data, "images/new.jpg"),
        "a list": lambda: write(excluded, ["coco/9", "coco/25"]),
        "captions": lambda: coco(data, notes="more"),
        "a tar": lambda: img2dataset(data / "cc", texts=[t[::-1] for t in WORDS]),
    }
    for what, edit in edits.items():
        assert again()[1], what
        edit()
        assert not again()[1], what
    (out / PLAN_FILE).write_bytes(b"PAR1")
    assert not again()[1], "a damaged plan is made again"


def test_the_hash_of_the_inputs_is_the_same_in_every_process(tmp_path):
    """Python orders a set differently in every process; the hash must not."""
    put(tmp_path, "1.jpg")
    request = make_request(Extract(images=str(tmp_path), splits="train,val,test"), Catalog())
    inventory = find_files(request)
    said = inputs_digest(request, inventory, 1)
    shuffled = [frozenset(order) for order in (("test", "val", "train"), ("val", "train", "test"))]
    for splits in shuffled:
        object.__setattr__(request, "splits", splits)
        assert inputs_digest(request, inventory, 1) == said
    assert saved_plan(tmp_path, said, NO_CACHE) is None
