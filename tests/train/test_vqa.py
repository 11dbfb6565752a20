"""Answers: how they are compared, which are classes, and what they are worth, against counts by hand."""

import json
from pathlib import Path

import pytest
from support import SHARDS, run_here
from task_shards import write_task_shards

from oscar_common.errors import UsageError
from oscar_common.settings import Finetune
from oscar_train.data.corpus import open_corpus
from oscar_train.data.sources import open_source
from oscar_train.data.texts.phrases import QA
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.tasks.questions import Question, read_people, read_questions
from oscar_train.tasks.vqa import make_targets, make_task
from oscar_train.tasks.vqa_text import common_answers, normalised, official_score, soft_score


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The two dogs.", "2 dogs"),
        ("Yes", "yes"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("5.5", "5.5"),
        ("  An apple \n", "apple"),
        ("t-shirt", "t shirt"),
        ("what?", "what"),
        ("mr. smith", "mr smith"),
    ],
)
def test_answers_are_compared_as_in_the_evaluation_of_vqa(given: str, expected: str):
    assert normalised(given) == expected


def test_soft_scores():
    assert [soft_score(count) for count in range(6)] == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


@pytest.mark.parametrize("count", range(11))
def test_the_official_score_is_the_mean_over_leaving_one_out(count: int):
    people = ["it"] * count + ["other"] * (10 - count)
    rest = [people[:n] + people[n + 1 :] for n in range(10)]
    expected = sum(min(others.count("it") / 3, 1) for others in rest) / 10
    assert official_score(count, 10) == pytest.approx(expected)


def test_classes_are_the_answers_given_often_enough():
    answers = ["yes"] * 10 + ["no"] * 9 + ["blue"] * 9 + ["red"] * 8 + [""] * 20
    assert common_answers(answers, 9) == ["yes", "blue", "no"]


def test_targets_are_counts_of_ten_people():
    people = ("yes", "yes", "no", "no", "no", "no", "maybe", "maybe", "2", "2")
    questions = [None, Question(best="no", people=people), Question(best="yes", people=("yes",))]
    targets = make_targets(["yes", "no"], {"shards": questions})
    assert targets.classes.tolist() == [[-1, -1], [0, 1], [0, -1]]
    assert targets.soft[1].tolist() == pytest.approx([0.6, 1.0])
    assert targets.official[1].tolist() == pytest.approx([official_score(2, 10), official_score(4, 10)])
    assert targets.soft[2, 0] == targets.official[2, 0] == 1


def test_the_vocabulary_comes_from_the_shards_and_the_annotations(tmp_path: Path, tokenizer: Tokenizer):
    shards = write_task_shards("vqa", tmp_path / "shards")
    source = open_source(str(shards), False)
    annotations = tmp_path / "annotations.json"
    given = [{"answer": "The Cat"}] * 3 + [{"answer": "dog"}] * 7
    content = {"annotations": [{"question_id": "q0", "multiple_choice_answer": "dog", "answers": given}]}
    annotations.write_text(json.dumps(content))
    assert read_people([str(annotations)]) == {"q0": ("cat",) * 3 + ("dog",) * 7}

    settings = Finetune(task="vqa", min_answers=2, annotations=[str(annotations)])
    task = make_task(settings, [source], tokenizer)
    targets = task.criterion.keywords["targets"]
    questions = [row for row in targets.classes.tolist() if row[0] >= 0]
    assert len(targets.names) >= 3
    assert sum(len([number for number in row if number >= 0]) == 2 for row in questions) == 1  # q0 has both answers


def test_annotations_of_another_form_are_one_line(tmp_path: Path):
    (tmp_path / "captions.json").write_text('{"annotations": [{"caption": "a dog"}]}')
    with pytest.raises(UsageError, match="no annotations of VQA"):
        read_people([str(tmp_path / "captions.json")])


def test_questions_stand_where_the_corpus_has_them(tmp_path: Path, tokenizer: Tokenizer):
    """With the files of VQA laid over the shards: the same triples, the same answers, and ten people."""
    shards = write_task_shards("vqa", tmp_path / "shards")
    asked = [{"question_id": n, "image_id": f"{n}.jpg", "question": f"Is it {n}?"} for n in range(0, 24, 2)]
    told = [
        {"question_id": n, "multiple_choice_answer": "yes", "answers": [{"answer": "yes"}] * 6 + [{"answer": "no"}] * 4}
        for n in range(0, 24, 2)
    ]
    questions, annotations = tmp_path / "train_questions.json", tmp_path / "train_annotations.json"
    questions.write_text(json.dumps({"questions": asked}))
    annotations.write_text(json.dumps({"annotations": told}))
    overlay = tmp_path / "vqa.parquet"
    done = run_here(SHARDS, "texts", shards, "--captions", questions, "--out", overlay)
    assert done.returncode == 0, done.stderr

    source = open_source(str(shards), False)
    corpus = open_corpus([source], tokenizer, tmp_path / "cache", [overlay])
    (found,) = read_questions([source], [str(overlay)], tokenizer, read_people([str(annotations)]))
    assert len(found) == len(corpus)
    assert sum(question is not None and len(question.people) == 10 for question in found) == 12
    for triple, question in enumerate(found):
        assert (question is not None) == (corpus.kind[triple] == QA)
        if question is not None and question.best != "2 of them":  # whose tokens in the corpus are those of "two"
            tokens = tokenizer([question.best], 30)[0].tolist()
            assert corpus.second[int(corpus.second_row[triple])].tolist() == tokens
