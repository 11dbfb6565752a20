"""Captions from log-probabilities: the likeliest token each time, one drawn at random, or a search in beams.

A caption of at most n tokens is what comes before [SEP]. One that has no [SEP] among its n tokens is cut before the
last, where microsoft/Oscar puts [SEP]. Its score is the mean log-probability of the tokens that were predicted.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oscar_train.captioning.constraints import FREE, Machine
from oscar_train.captioning.decoder import Context, Decoder

MOST_TOKENS = 19  # predicted, [SEP] included: microsoft/Oscar's --max_gen_length 20, which counts [CLS], too
BEAMS = 5  # as in its documented commands

Choose = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Caption:
    """Token ids without [CLS] and [SEP].

    last: the token after them, [SEP] or the one before which it was cut. score: see the module. satisfied: how many
    constraints it satisfies.
    """

    tokens: list[int]
    last: int
    score: float
    satisfied: int = 0


@dataclass(frozen=True)
class _Beginning:
    """The beginning of a caption, [CLS] left out.

    total: of its log-probabilities. state: of the machine. parent: its place among those of the step before.
    """

    total: float
    tokens: list[int]
    state: int
    parent: int = 0


START = _Beginning(0.0, [], 0)


class _Search:
    """The search for the caption of one image.

    open: beginnings that may go on, best first of each state. best: for each number of constraints, up to those that
    are required, the best caption.
    """

    def __init__(self, machine: Machine, beams: int, most: int, length_penalty: float) -> None:
        self.machine, self.beams, self.most, self.length_penalty = machine, beams, most, length_penalty
        self.awaited = sorted(set().union(*machine.moves))  # all other tokens lead to the same state
        self.open, self.best = [START], dict[int, Caption]()

    def advance(self, log_probabilities: Tensor, end: int) -> None:
        """Go on by a token. log_probabilities: [G, vocabulary], of which the rows of open beginnings come first."""
        choices = defaultdict[int, list[_Beginning]](list)
        for choice in self._choices(log_probabilities[: len(self.open)]):
            choices[choice.state].append(choice)

        self.open = []
        for state in sorted(choices):
            best = heapq.nlargest(2 * self.beams, choices[state], key=lambda choice: choice.total)
            self.open += self._set_aside(best, end)

        if self._is_done():
            self.open = []

    def result(self) -> Caption:
        """Return the best caption of those that satisfy the most constraints."""
        return self.best[max(self.best)]

    def _choices(self, log_probabilities: Tensor) -> Iterator[_Beginning]:
        """Yield the beginnings with another token: any that is awaited, and the likeliest others."""
        count = min(2 * self.beams, log_probabilities.shape[1] - len(self.awaited))
        if not self.awaited:
            values, numbers = log_probabilities.topk(count)
        else:
            awaited = torch.tensor(self.awaited, device=log_probabilities.device)
            values, numbers = log_probabilities.index_fill(-1, awaited, -torch.inf).topk(count)
            values = torch.cat([values, log_probabilities.index_select(-1, awaited)], -1)
            numbers = torch.cat([numbers, awaited.expand(len(numbers), -1)], -1)

        rows = zip(self.open, values.tolist(), numbers.tolist(), strict=True)
        for parent, (beginning, likely, tokens) in enumerate(rows):
            for value, token in zip(likely, tokens, strict=True):
                state = self.machine.next(beginning.state, token)
                yield _Beginning(beginning.total + value, [*beginning.tokens, token], state, parent)

    def _set_aside(self, choices: list[_Beginning], end: int) -> list[_Beginning]:
        """Keep the captions among choices, best first, until there are `beams` others; return these."""
        going_on: list[_Beginning] = []
        for choice in choices:
            has_ended, is_full = choice.tokens[-1] == end, len(choice.tokens) == self.most
            if has_ended or is_full:
                self._keep(choice)
            else:
                going_on.append(choice)

            if len(going_on) == self.beams:
                break

        return going_on

    def _keep(self, ended: _Beginning) -> None:
        """Keep a caption, without its last token, if it is the best so far."""
        tokens, length = ended.tokens[:-1], len(ended.tokens)
        state = 0
        for token in tokens:
            state = self.machine.next(state, token)

        satisfied, score = self.machine.satisfied[state], ended.total / length**self.length_penalty
        level = min(satisfied, self.machine.required)
        if level not in self.best or score > self.best[level].score:
            self.best[level] = Caption(tokens, ended.tokens[-1], score, satisfied)

    def _is_done(self) -> bool:
        """Whether no open beginning can become better than the best caption."""
        if self.machine.required not in self.best or not self.open:
            return False
        highest = max(beginning.total for beginning in self.open) / self.most**self.length_penalty
        return bool(self.best[self.machine.required].score >= highest)


def greedy(decoder: Decoder, context: Context, most: int = MOST_TOKENS) -> list[Caption]:
    """Take the likeliest token each time; return the caption of each image."""
    return [captions[0] for captions in step_by_step(decoder, context, lambda scores, step: scores.argmax(-1), 1, most)]


def step_by_step(
    decoder: Decoder, context: Context, choose: Choose, captions: int, most: int = MOST_TOKENS
) -> list[list[Caption]]:
    """Write captions token by token, without looking back.

    Args:
        choose: picks tokens int64 [B, G] by log-probabilities [B, G, vocabulary] and the step, counted from 0.
        captions: of each image, G.
    """
    beginnings = decoder.begin(context, captions)
    tokens = torch.full((len(context), captions), decoder.first, device=context.unseen.device)
    written, scores = [], []
    has_ended = torch.zeros_like(tokens, dtype=torch.bool)

    for step in range(most):
        log_probabilities, beginnings = decoder.step(context, beginnings, tokens)
        tokens = choose(log_probabilities, step)
        written.append(tokens)
        scores.append(log_probabilities.gather(-1, tokens[..., None])[..., 0])
        has_ended |= tokens == decoder.end
        if has_ended.all():
            break

    rows = zip(torch.stack(written, -1).tolist(), torch.stack(scores, -1).tolist(), strict=True)
    return [[_until_end(*pair, decoder.end) for pair in zip(*image, strict=True)] for image in rows]


def _until_end(tokens: list[int], scores: list[float], end: int) -> Caption:
    """Return the caption that ends at the first [SEP], or before the last token."""
    length = tokens.index(end) if end in tokens else len(tokens) - 1
    return Caption(tokens[:length], tokens[length], sum(scores[: length + 1]) / (length + 1))


def beam_search(
    decoder: Decoder,
    context: Context,
    machines: Sequence[Machine] = (),
    *,
    beams: int = BEAMS,
    most: int = MOST_TOKENS,
    length_penalty: float = 1.0,
) -> list[Caption]:
    """Search for the best caption of each image, with as many beams for each state of its machine.

    In each step the best 2 x beams continuations that lead to a state are looked at in turn: those that end are set
    aside, the others go on until there are `beams` of them. With a machine of one state this is the search of
    microsoft/Oscar. Where no caption satisfies as many constraints as the machine requires, one that satisfies the most
    is returned.

    Args:
        machines: of the images; where there are none, anything may be written.
        length_penalty: the power of its length by which a caption's total is divided.
    """
    machines = machines or [FREE] * len(context)
    searches = [_Search(machine, beams, most, length_penalty) for machine in machines]
    beginnings = decoder.begin(context)

    while any(search.open for search in searches):
        tokens, parents = _last_tokens(searches, decoder.first, context.unseen.device)
        log_probabilities, beginnings = decoder.step(context, beginnings, tokens, parents)
        for search, rows in zip(searches, log_probabilities, strict=True):
            search.advance(rows, decoder.end)

    return [search.result() for search in searches]


def _last_tokens(searches: list[_Search], first: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the last tokens of all open beginnings, and their parents: int64 [B, G], filled up with whatever."""
    width = max(len(search.open) for search in searches)
    rows = [search.open + [START] * (width - len(search.open)) for search in searches]
    tokens = [[beginning.tokens[-1] if beginning.tokens else first for beginning in row] for row in rows]
    parents = [[beginning.parent for beginning in row] for row in rows]
    return torch.tensor(tokens, device=device), torch.tensor(parents, device=device)
