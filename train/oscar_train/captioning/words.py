"""A caption as the words that metrics count: Penn Treebank tokens in lower case, without punctuation.

COCO's evaluation runs Stanford's PTBTokenizer (CoreNLP 3.4.1, a Java program) with -preserveLines and -lowerCase, then
leaves out a list of punctuation (pycocoevalcap, tokenizer/ptbtokenizer.py). The rules below do what captions need of
that, so that training can score them without Java. They keep its oddities, because the published numbers have them:
brackets stay, as `-lrb-` and the like, and so does the dot of an abbreviation.

Of 14,497 COCO captions that the rules were tried on, one comes out otherwise ("hors d'oeurves"). Known to differ: web
addresses, `'n'`, `'tis`, other French contractions, and abbreviations that are not listed.
"""

import re

ABBREVIATIONS = (
    *("mr", "mrs", "ms", "dr", "prof", "rev", "gen", "col", "lt", "sgt", "capt", "gov", "sen", "rep", "hon"),
    *("jr", "sr", "st", "ave", "blvd", "rd", "mt", "ft", "co", "corp", "inc", "ltd", "bros", "dept"),
    *("etc", "vs", "esp", "approx", "jan", "feb", "mar", "apr", "aug", "sept", "sep", "oct", "nov", "dec"),
)
CLITICS = ("s", "m", "d", "re", "ve", "ll")  # after an apostrophe
TWO_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
    "wanna": ("wan", "na"),
}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": " - ", "—": " - ", "…": "."})

TOKEN = re.compile(
    rf"""
      (?: [^\W\d_] \. ){{2,}}                          # u.s., p.m.
    | (?: {"|".join(ABBREVIATIONS)} ) \. (?! \w )      # mr.
    | [a-z]+ (?= n't \b ) | n't \b                     # do n't
    | ' (?: {"|".join(CLITICS)} ) \b                   # man 's
    | \d+ (?: [:.,]\d+ )* (?= [ap]m\b )               # 5:54 pm
    | \w+ (?: (?: [-./&] | (?<=\d)[,:](?=\d) ) \w+ )*   # t-shirt, and/or, 1,000, 12:30
    | [?!]{{2,}}
    | \S
    """,
    re.VERBOSE,
)
PUNCTUATION = frozenset("'`.?!,:-;\"")


def split_words(caption: str) -> list[str]:
    """Return the words of a caption, none if it has no word."""
    words: list[str] = []
    for token in TOKEN.findall(caption.lower().translate(PLAIN)):
        words.extend(TWO_WORDS.get(token) or (BRACKETS.get(token, token),))

    return [word for word in words if word not in PUNCTUATION]
