"""Answers as the evaluation of VQA v2 compares them: lower case, without punctuation and articles,
numbers as digits, contractions with their apostrophes.

Source: Antol et al., VQA: Visual Question Answering (2015), and the evaluation code of
https://visualqa.org/evaluation.html, whose lists these are.
"""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
_DIGITS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
    you're you've
"""
# Each one without one of its apostrophes.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
}
_BETWEEN_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # the one in 3.5 stays


def normalize(text: str) -> str:
    """An answer in the form that is compared."""
    text = " ".join(text.split())
    words = (_DIGITS.get(word, word) for word in _drop_punctuation(text).lower().split())
    kept = (word for word in words if word not in _ARTICLES)
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


def _drop_punctuation(text: str) -> str:
    """A mark inside of a word becomes a space; one beside a space is dropped, and so is any in a
    text with a number such as 1,000.
    """
    joined, result = _BETWEEN_DIGITS.search(text) is not None, text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if joined or beside else " ")
    return _PERIOD.sub("", result)
