"""METEOR and SPICE, which only COCO's own evaluation has: pycocoevalcap, where it and Java are there."""

import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec

from oscar_common.errors import reason
from oscar_train.captioning.words import split_words

PACKAGE = "pycocoevalcap"
NAMES = ("meteor", "spice")


def java_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict[str, float], list[str]]:
    """Return METEOR and SPICE of captions, as far as they can be had, and a line for each that cannot."""
    if find_spec(PACKAGE) is None:
        return {}, [
            f"without {' and '.join(NAMES)}: {PACKAGE} is not installed (pip install 'oscar-pretrain[captions]')"
        ]
    if shutil.which("java") is None:
        return {}, [f"without {' and '.join(NAMES)}: they need Java, and there is no java command"]

    candidates = {number: [" ".join(split_words(caption))] for number, caption in enumerate(captions)}
    truth = {number: [" ".join(split_words(text)) for text in texts] for number, texts in enumerate(references)}
    scores: dict[str, float] = {}
    absent: list[str] = []

    for name in NAMES:
        try:
            scores[name] = _score(name, truth, candidates)
        except Exception as error:  # whatever Java, or a download that SPICE tries, comes to
            absent.append(f"without {name}: {reason(error)}")

    return scores, absent


def _score(name: str, truth: dict[int, list[str]], own: dict[int, list[str]]) -> float:
    with redirect_stdout(sys.stderr):  # they talk
        if name == "meteor":
            from pycocoevalcap.meteor.meteor import Meteor

            return float(Meteor().compute_score(truth, own)[0])

        from pycocoevalcap.spice.spice import Spice

        return float(Spice().compute_score(truth, own)[0])
