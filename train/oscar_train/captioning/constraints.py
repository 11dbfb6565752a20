"""What a caption must mention, as a finite-state machine that reads its tokens.

Constrained beam search (Anderson et al. 2017, arXiv 1612.00576) keeps beams of their own for each state of such a
machine; NoCaps (Agrawal et al. 2019, arXiv 1812.08658) has captions mention objects that a detector found.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from oscar_common.errors import UsageError

Phrase = tuple[int, ...]  # token ids, at least one
MOST = 3  # constraints, as in NoCaps: each doubles the states
REQUIRED = 2  # of them that a caption must satisfy, or all if there are fewer


@dataclass(frozen=True)
class Machine:
    """A machine of S states, which begins in state 0.

    moves: for each state, to which one a token leads. otherwise: for each state, to which one any other token leads.
    satisfied: how many constraints are satisfied in each state. required: how many should be.
    """

    moves: list[dict[int, int]]
    otherwise: list[int]
    satisfied: list[int]
    required: int

    def next(self, state: int, token: int) -> int:
        """Return the state after a token."""
        return self.moves[state].get(token, self.otherwise[state])


FREE = Machine([{}], [0], [0], 0)  # anything may be written


@dataclass(frozen=True)
class _State:
    """The constraints satisfied so far, and the last tokens as far as they begin a phrase of another constraint."""

    satisfied: frozenset[int]
    begun: Phrase


def build_machine(constraints: Sequence[Sequence[Phrase]], required: int = REQUIRED) -> Machine:
    """Return the machine that finds out which constraints are satisfied.

    Args:
        constraints: for each, the phrases of which one must occur (the forms of a word).
        required: how many must be satisfied, or all if there are fewer.
    """
    alphabet = sorted({token for phrases in constraints for phrase in phrases for token in phrase})
    states = [_State(frozenset(), ())]
    numbers = {states[0]: 0}
    moves: list[dict[int, int]] = []
    otherwise: list[int] = []

    def number(state: _State) -> int:
        if state not in numbers:
            numbers[state] = len(states)
            states.append(state)
        return numbers[state]

    for state in states:  # which grows meanwhile
        moves.append({token: number(_after(state, token, constraints)) for token in alphabet})
        otherwise.append(number(_State(state.satisfied, ())))

    satisfied = [len(state.satisfied) for state in states]
    return Machine(moves, otherwise, satisfied, min(required, len(constraints)))


def _after(state: _State, token: int, constraints: Sequence[Sequence[Phrase]]) -> _State:
    """Return the state after a token of a phrase."""
    written = (*state.begun, token)
    ended = {n for n, phrases in enumerate(constraints) if any(_ends_with(written, phrase) for phrase in phrases)}
    satisfied = state.satisfied | ended

    open_phrases = [phrase for n, phrases in enumerate(constraints) if n not in satisfied for phrase in phrases]
    suffixes = (written[begin:] for begin in range(len(written)))
    begun = next((suffix for suffix in suffixes if any(_begins(phrase, suffix) for phrase in open_phrases)), ())

    return _State(satisfied, begun)


def _ends_with(written: Phrase, phrase: Phrase) -> bool:
    return written[-len(phrase) :] == phrase


def _begins(phrase: Phrase, suffix: Phrase) -> bool:
    return len(suffix) < len(phrase) and phrase[: len(suffix)] == suffix


def check_words(words: Sequence[str]) -> None:
    """Refuse words that no caption can be made to mention.

    Raises:
        UsageError: there are too many, or one is empty.
    """
    if len(words) > MOST:
        raise UsageError(f"--mention: given {len(words)} times; at most {MOST} can be asked for")
    for word in words:
        if not all(form.strip() for form in word.split("|")):
            raise UsageError(f"--mention {word!r}: an empty word; give a word, or its forms like 'dog|dogs'")
