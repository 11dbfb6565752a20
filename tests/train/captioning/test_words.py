"""Captions become the words of COCO's evaluation."""

import pytest

from oscar_train.captioning.words import split_words

# What Stanford's PTBTokenizer 3.4.1 (-preserveLines -lowerCase) made of them, and then pycocoevalcap 1.2, which leaves
# out punctuation
STANFORD = [
    ("A man's dog; he can't run!", "a man 's dog he ca n't run"),
    ('A (small) "t-shirt" and/or hat...', "a -lrb- small -rrb- t-shirt and/or hat"),
    ("on Mr. Smith's U.S. desk at 3.5 p.m.", "on mr. smith 's u.s. desk at 3.5 p.m."),
    ("I cannot do $5.00 50% #1 & co. etc.", "i can not do $ 5.00 50 % # 1 & co. etc."),
    ("two 1,000-piece puzzles -- 'quoted' text", "two 1,000-piece puzzles quoted text"),
    ("they've, I'm we'll you'd dogs' 1990's", "they 've i 'm we 'll you 'd dogs 1990 's"),
    ("A chair,couch and suitcase", "a chair couch and suitcase"),
    ("enjoy the beach--kite flying, bathing", "enjoy the beach kite flying bathing"),
    ("the time of 5:54pm, 10th ave", "the time of 5:54 pm 10th ave"),
    ("A cat.\nA dog", "a cat a dog"),
    ("a TV/VCR *star* a_b a+b=c ~", "a tv/vcr * star * a_b a + b = c ~"),
    ("…and so—on “quoted” ‘single’ it’s ?!", "and so on quoted single it 's ?!"),
    (" . ", ""),
]


@pytest.mark.parametrize(("caption", "words"), STANFORD)
def test_words_are_those_of_stanfords_tokenizer(caption: str, words: str):
    assert split_words(caption) == words.split()
