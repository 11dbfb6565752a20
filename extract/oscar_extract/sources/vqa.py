"""VQA v2 on COCO images: *_questions.json and *_annotations.json of each split."""

from typing import Any

from oscar_extract.sources.coco import locate_coco
from oscar_extract.sources.place import Place, annotations, read_json, split_of
from oscar_extract.sources.splits import karpathy_split
from oscar_extract.sources.tables import Annotations, reading

QUESTIONS = r"OpenEnded_mscoco_(?P<split>\w+?)_questions[^/]*\.json$"
ANSWERS = r"mscoco_(?P<split>\w+?)_annotations[^/]*\.json$"


def read_vqa(place: Place) -> Annotations:
    """Read the questions of all splits for their images, and questions with the commonest answer of those wanted.

    A question without an answer is left out. Karpathy's split of COCO, where it is there, decides for the images.
    """
    split = karpathy_split(place.inventory, "coco")
    answers = _answers(place)
    images: dict[int, str] = {}
    texts: list[tuple[Any, ...]] = []
    for path in place.required(QUESTIONS, "*OpenEnded_mscoco_*_questions.json"):
        of_file = split_of(path.name.partition("mscoco_")[2])
        with reading(path, "--root"):
            for question in read_json(path, dict)["questions"]:
                number = int(question["image_id"])
                images[number] = split.get(f"coco/{number}", of_file)
                answer = answers.get(question["question_id"]) if of_file in place.splits else None
                if answer is not None:
                    asked = str(question["question"])
                    texts.append((f"coco/{number}", "qa", "vqa", str(question["question_id"]), None, asked, answer))
    listed = [("vqa", f"coco/{number}", "", of_image) for number, of_image in images.items()]
    return annotations(listed, locate_coco(place, listed), texts)


def _answers(place: Place) -> dict[Any, str]:
    answers: dict[Any, str] = {}
    for path in place.annotations(ANSWERS):
        if split_of(path.name.partition("mscoco_")[2]) in place.splits:
            with reading(path, "--root"):
                content = read_json(path, dict)["annotations"]
                answers |= {a["question_id"]: str(a["multiple_choice_answer"]) for a in content}
    return answers
