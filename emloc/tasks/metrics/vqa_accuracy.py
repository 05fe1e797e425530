"""VQA accuracy: agreement with the answers of several people, the metric of VQA and TextVQA.

The rules are those of the VQA challenge (Antol et al. 2015, section 3, and its evaluation script).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

AGREE = 3  # number of people with the same answer that gives the full score

_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS.split())}

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
    you're you've
"""
# Contraction with one apostrophe missing -> correct spelling.
_APOSTROPHE_FIXES = {
    word[:index] + word[index + 1 :]: word
    for word in _CONTRACTIONS.split()
    for index, character in enumerate(word)
    if character == "'"
}


def score(
    prediction: str, references: Sequence[str], choices: Sequence[str] = ()
) -> dict[str, float]:
    """`vqa_accuracy`: how many people gave this answer; three or more give the full score.

    Each person is left out in turn, and the others give min(1, matches / 3). The score is the mean
    of these values. Among 10 people, 1, 2, 3 and 4 matches give 0.3, 0.6, 0.9 and 1.

    Answer and references are normalised in the same way, as for TextVQA. The challenge's own script
    differs: it does not normalise the words of the references, since they are normalised in the
    data, and normalises nothing if all people gave the same answer. lmms-eval's `textvqa` and
    TextVQA's own processor differ, too: they first remove all commas and question marks, and
    separate 's from its word.

    Raises:
        ValueError: there are fewer than 4 references, so that no answer could score 1.
    """
    if len(references) <= AGREE:
        raise ValueError(
            f"vqa_accuracy: {len(references)} references, but the metric needs at least {AGREE + 1}"
        )
    answer = normalise(prediction)
    matches = [normalise(reference) == answer for reference in references]
    other_matches = [min(AGREE, sum(matches) - match) for match in matches]
    return {"vqa_accuracy": sum(other_matches) / (AGREE * len(references))}


def normalise(text: str) -> str:
    """The answer in lower case, without articles and punctuation; numbers to ten become digits.

    A punctuation mark is replaced by a space. It is removed without a space if it is next to a
    space anywhere in the text, or if the text has a number with a comma. Apostrophes, colons, and
    periods before a digit are kept.
    """
    text = " ".join(text.split())
    has_comma_number = _COMMA_IN_NUMBER.search(text) is not None
    beside_space = {mark for mark in _PUNCTUATION if f"{mark} " in text or f" {mark}" in text}
    replacements = {
        ord(mark): "" if has_comma_number or mark in beside_space else " " for mark in _PUNCTUATION
    }
    words = _PERIOD.sub("", text.translate(replacements)).lower().split()
    with_digits = (_DIGITS.get(word, word) for word in words)
    return " ".join(
        _APOSTROPHE_FIXES.get(word, word) for word in with_digits if word not in _ARTICLES
    )
