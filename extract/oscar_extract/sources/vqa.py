"""VQA v2 on COCO images: *_questions.json and *_annotations.json of each split."""

from pathlib import Path
from typing import Any

from oscar_common.errors import UsageError
from oscar_common.tables import reading
from oscar_extract.sources.coco import locate_coco
from oscar_extract.sources.place import Place, annotations, read_json, split_of
from oscar_extract.sources.tables import Annotations

QUESTIONS = r"OpenEnded_mscoco_[\w-]+?_questions[^/]*\.json$"
ANSWERS = r"mscoco_[\w-]+?_annotations[^/]*\.json$"


def read_vqa(place: Place) -> Annotations:
    """Read the questions of all splits for their images, and questions with the commonest answer of those wanted.

    A question without an answer is left out. Karpathy's split of COCO, where it is there, decides for the images.
    Where version 2 is there, version 1 is not read: the same numbers mean other questions in it.
    """
    split = place.karpathy.get("coco", {})
    answers = _answers(place)
    images: dict[int, str] = {}
    texts: list[tuple[Any, ...]] = []

    for path in _newest(place.required(QUESTIONS, "*OpenEnded_mscoco_*_questions.json")):
        of_file = split_of(path.name.partition("mscoco_")[2])
        if of_file in place.splits and of_file != "test" and of_file not in answers:
            raise UsageError(f"--root {place.root}: {path.name} has no *mscoco_{of_file}*_annotations.json beside it")

        with reading(path, "--root"):
            for question in read_json(path, dict)["questions"]:
                number = int(question["image_id"])
                of_image = split.get(f"coco/{number}", of_file)
                if of_image in place.splits and of_file not in place.splits:
                    continue  # Karpathy's training split has it, but no question about it is wanted

                images[number] = of_image
                answer = answers.get(of_file, {}).get(question["question_id"])
                if answer is not None:
                    question_text = str(question["question"])
                    texts.append(
                        (f"coco/{number}", "qa", "vqa", str(question["question_id"]), None, question_text, answer)
                    )

    listed = [("vqa", f"coco/{number}", "", of_image) for number, of_image in images.items()]
    return annotations(listed, locate_coco(place, listed), texts)


def _newest(paths: list[Path]) -> list[Path]:
    """Return the files of version 2, or if there are none, all."""
    return [path for path in paths if path.name.startswith("v2_")] or paths


def _answers(place: Place) -> dict[str, dict[Any, str]]:
    """Return the answers by split and question."""
    answers: dict[str, dict[Any, str]] = {}
    for path in _newest(place.annotations(ANSWERS)):
        if (split := split_of(path.name.partition("mscoco_")[2])) in place.splits:
            with reading(path, "--root"):
                content = read_json(path, dict, "question_id", "multiple_choice_answer")["annotations"]
                answers.setdefault(split, {}).update(
                    (a["question_id"], str(a["multiple_choice_answer"])) for a in content
                )

    return answers
