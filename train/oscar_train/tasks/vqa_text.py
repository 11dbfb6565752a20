"""Answers as the VQA evaluation compares them: without articles, punctuation and capitals, with digits for numbers.

The rules are those of VQA's own evaluation (vqaEval.py), as bottom-up attention applied them to count answers.
"""

import re
from collections import Counter
from collections.abc import Sequence

DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't she'd've she's should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTED.split()}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")


def normalised(answer: str) -> str:
    """Return an answer in the form in which answers are compared: "The two dogs." becomes "2 dogs"."""
    line = answer.replace("\n", " ").replace("\t", " ").strip()
    words = _without_punctuation(line).lower().split()
    plain = [DIGITS.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in plain).replace(",", "")


def _without_punctuation(answer: str) -> str:
    """Take out punctuation marks: those at the edge of a word leave nothing, those within a space."""
    cleaned, has_number = answer, COMMA.search(answer) is not None
    for mark in PUNCTUATION:
        at_edge = f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if at_edge or has_number else " ")
    return PERIOD.sub("", cleaned)


def common_answers(answers: Sequence[str], least: int) -> list[str]:
    """Return the answers that are given at least so often, the most frequent first, equally frequent ones by name.

    Args:
        answers: of each question the one that most people gave, normalised.
        least: how often.
    """
    counts = Counter(answer for answer in answers if answer)
    often = [answer for answer, count in counts.items() if count >= least]
    return sorted(often, key=lambda answer: (-counts[answer], answer))


def soft_score(count: int) -> float:
    """Return the target of an answer that so many of ten people gave (bottom-up attention's): 0, .3, .6, .9, 1."""
    return min(0.3 * count, 1.0)


def official_score(count: int, people: int) -> float:
    """Return VQA's accuracy of an answer that `count` of `people` gave: min(n / 3, 1), the mean over leaving one out.

    Each of the people is left out once, and the answers of the others are counted.
    """
    of_others = min((count - 1) / 3, 1.0) * count
    return (of_others + min(count / 3, 1.0) * (people - count)) / people
