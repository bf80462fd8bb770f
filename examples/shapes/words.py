"""Texts in the images: numbers of one to four digits, common short words, and random letters."""

from __future__ import annotations

import numpy as np

WORDS = tuple(
    """
    cat dog sun sea sky car bus hat cup pen box key map net pot jam tea egg ham pie nut fig oak ash
    elm bee ant fox owl hen pig cow bat rat ram ewe cod eel cap tie zip bag bed mat rug fan lid pan
    jug mug tin jar can gas oil fun joy run sit hop fly swim walk jump sing read play work rest open
    shut stop go wait slow fast hot cold warm cool wet dry big tiny old new good bad hello home door
    wall roof lamp desk sofa bath sink fork dish soup cake milk rice bean corn salt leaf tree rose
    lily moss fern hill lake pond river rain snow wind moon mars sand rock gold iron zinc coal wood
    wool silk lace drum harp horn lute band song duck goose swan crow dove hawk wolf bear deer lion
    tiger zebra camel horse sheep goat mouse frog toad newt crab fish whale shark boat ship sail
    raft train plane truck bike cart sled wheel exit sale push pull free cafe taxi hotel shop bank
    post park zoo club gym bar pub inn quiz jazz film book page note word idea time hour week year
    spring june july april may king queen duke lord lady baby uncle aunt
    """.split()  # noqa: SIM905
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = "0123456789" + LETTERS


def random_text(rng: np.random.Generator, random_letters: float = 0.5) -> str:
    """A number (half the time) or a word of up to five letters, in upper, lower or title case."""
    if rng.random() < 0.5:
        digits = int(rng.integers(1, 5))
        return str(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
    if rng.random() < random_letters:
        word = "".join(LETTERS[i] for i in rng.integers(26, size=int(rng.integers(2, 6))))
    else:
        word = WORDS[rng.integers(len(WORDS))]
    case = rng.random()
    return word.upper() if case < 0.5 else word if case < 0.8 else word.capitalize()
