"""What is asked about a triple: which part of it is replaced, by what, how that is called, and how tokens are masked.

docs/objectives.md has the source of every difference.
"""

from dataclasses import dataclass, replace

from oscar_common.settings import Train

MATCHED, WRONG_W, WRONG_Q, WRONG = "matched", "wrong w", "wrong q", "polluted"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The pre-training tasks of a run.

    classes: of the contrastive loss, in the order of its labels; `WRONG` stands for both kinds where there are two.
    wrong_w, wrong_q: which share of the triples gets another w, or another q. (A triple without q gets another w for
    either.)
    negatives: where the other one is from: typed (the same side of a triple of the same kind), any (the same side of
    any triple), lines (a q may also be the w of a triple).
    exact: 15 % of each text's tokens, at least one, rounded up or down so that every token is masked equally often;
    else each token on its own, possibly none, as the releases do.
    any_token: whether the random token that replaces one in ten may be [unused7] or [CLS], as in the releases.
    whole_words: whether words are masked instead of tokens.
    """

    classes: tuple[str, ...]
    wrong_w: float
    wrong_q: float
    negatives: str
    exact: bool = True
    any_token: bool = False
    whole_words: bool = False

    def label(self, name: str) -> int:
        """Return the label of one of `MATCHED`, `WRONG_W`, `WRONG_Q`."""
        return self.classes.index(name if name in self.classes else WRONG)


_OSCAR = Objective(classes=(WRONG, MATCHED), wrong_w=0.0, wrong_q=0.5, negatives="typed")
_PLUS = Objective(classes=(MATCHED, WRONG_W, WRONG_Q), wrong_w=0.25, wrong_q=0.25, negatives="any")
_VISUALBERT = Objective(classes=(MATCHED, WRONG), wrong_w=0.5, wrong_q=0.0, negatives="typed")


def _released(paper: Objective, *classes: str, negatives: str) -> Objective:
    return replace(paper, classes=classes, negatives=negatives, exact=False, any_token=True)


TABLE = {
    ("oscar", "paper"): _OSCAR,
    ("oscar", "release"): _released(_OSCAR, MATCHED, WRONG, negatives="lines"),
    ("oscar-plus", "paper"): _PLUS,
    ("oscar-plus", "release"): _released(_PLUS, MATCHED, WRONG_Q, WRONG_W, negatives="any"),
    ("visualbert", "paper"): _VISUALBERT,
    ("visualbert", "release"): _released(_VISUALBERT, WRONG, MATCHED, negatives="typed"),
}
OSCAR = _OSCAR


def choose_objective(settings: Train) -> Objective:
    """Return the objective that the settings name."""
    chosen = TABLE[settings.objective, settings.variant]
    return replace(chosen, negatives=settings.negatives or chosen.negatives, whole_words=settings.whole_word_masking)


def choose_tags(settings: Train) -> str:
    """Return which tags are q: one of `oscar_common.settings.TAGS`."""
    if settings.tags is not None:
        return settings.tags
    if settings.objective == "visualbert":
        return "none"
    return "ground-truth" if settings.variant == "release" else "detected"


def choose_region_init(settings: Train) -> str:
    """Return where the embedding of regions begins: one of `oscar_common.settings.REGION_INITS`."""
    return settings.region_init or ("random" if settings.variant == "release" else "tags")
