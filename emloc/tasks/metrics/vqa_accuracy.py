"""Soft accuracy over the answers of several people, the metric of VQA and of TextVQA.

The rules are those of the VQA challenge (Antol et al. 2015, section 3, and its evaluation script).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

AGREE = 3  # people whose answer is right beyond doubt

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
# Each as it looks when one of its apostrophes was left out.
_COMPLETED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, sign in enumerate(word)
    if sign == "'"
}


def score(
    prediction: str, references: Sequence[str], choices: Sequence[str] = ()
) -> dict[str, float]:
    """`vqa_accuracy`: how many people gave this answer, full marks from three on.

    Each person is left out in turn and min(1, matches among the others / 3) taken; the mean of
    these is the score. Of 10 people 1, 2, 3 and 4 who agree give 0.3, 0.6, 0.9 and 1.

    Answer and references are normalised alike. The challenge's own script leaves the references'
    words as they are, for they come normalised. lmms-eval's `textvqa`, like TextVQA's own
    processor, first drops all commas and question marks and parts 's from its word.

    Raises:
        ValueError: there are fewer than 4 references, so that no answer at all could score 1.
    """
    if len(references) <= AGREE:
        raise ValueError(
            f"vqa_accuracy: {len(references)} references; it compares with {AGREE} besides the one "
            "that is left out"
        )
    answer = normalise(prediction)
    matches = [normalise(reference) == answer for reference in references]
    among_others = [min(AGREE, sum(matches) - match) for match in matches]
    return {"vqa_accuracy": sum(among_others) / (AGREE * len(references))}


def normalise(text: str) -> str:
    """The answer in lower case, without articles and punctuation, numbers to ten in digits.

    A punctuation mark leaves a space behind, unless it stands beside one somewhere in the text or
    a number in the text is grouped by commas. An apostrophe or a colon stays, and so does a period
    before a digit.
    """
    text = " ".join(text.split())
    grouped = _COMMA_IN_NUMBER.search(text) is not None
    loose = {mark for mark in _PUNCTUATION if f"{mark} " in text or f" {mark}" in text}
    blanks = {ord(mark): "" if grouped or mark in loose else " " for mark in _PUNCTUATION}
    words = _PERIOD.sub("", text.translate(blanks)).lower().split()
    digits = (_DIGITS.get(word, word) for word in words)
    return " ".join(_COMPLETED.get(word, word) for word in digits if word not in _ARTICLES)
