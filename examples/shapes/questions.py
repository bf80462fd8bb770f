"""Questions with exactly one correct answer, in several phrasings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .drawing import SHAPES
from .palette import COLORS
from .scene import POSITIONS, Scene, Thing

KINDS = ("count", "color", "shape", "where", "exists", "number", "word", "describe")
# how a description names a text
NUMBER_PHRASE, WORD_PHRASE = "the number {}", "the word {}"

PHRASINGS: dict[str, tuple[str, ...]] = {
    "count_all": (
        "how many objects are there", "how many shapes are there",
        "how many objects are in the picture",
        "how many shapes are in the image",
        "how many things can you see", "how many objects do you see", "count the objects",
        "count the shapes",
        "what is the number of objects",
        "how many objects can you see in the picture", "how many shapes does the picture show",
        "how many things are there in the image",
    ),
    "count_some": (
        "how many {} are there", "how many {} are in the picture",
        "how many {} are there in the image", "how many {} do you see",
        "how many {} can you see", "count the {}", "what is the number of {}",
    ),
    "color": (
        "what colour is the {}", "what is the colour of the {}", "which colour is the {}",
        "what colour does the {} have",
        "tell me the colour of the {}", "the {} is what colour", "name the colour of the {}",
        "what is the {}'s colour",
    ),
    "shape": (
        "what shape is the {}", "what is the shape of the {}", "which shape is the {}",
        "what is the {}", "what shape does the {} have",
        "name the shape of the {}", "what kind of shape is the {}",
    ),
    "shape_adjective": ("what shape is {}", "which shape is {}", "which object is {}", "what is {}",
        "what is drawn in {}"),
    "where": (
        "where is the {}", "where is the {} in the picture", "where is the {} in the image",
        "where can i find the {}",
        "what is the position of the {}", "in which part of the picture is the {}",
        "where do you see the {}", "where is the {} located",
    ),
    "exists": (
        "is there {}", "is there {} in the picture", "is there {} in the image", "do you see {}",
        "can you see {}",
        "does the picture show {}",
        "does the image contain {}", "is {} in the picture", "is {} visible",
    ),
    "exists_plural": ("are there any {}", "are there {}", "do you see any {}",
        "are there any {} in the picture", "can you see any {}"),
    "is_color": ("is the {} {}", "is the colour of the {} {}"),
    "number": (
        "what number is written", "what number is shown", "what number is this",
        "which number is in the picture",
        "which number do you see",
        "what number is printed", "read the number", "what number is written in the picture",
        "what is the number",
        "what does the number say",
        "what number is in the image",
    ),
    "word": (
        "what word is written", "what word is shown", "what word is this",
        "which word is in the picture", "which word do you see",
        "what word is printed", "read the word", "what word is written in the picture",
        "what is the word", "what does the word say",
        "what word is in the image",
    ),
    "text": ("what is written", "what does the text say", "read the text",
        "what is written in the picture", "what text do you see"),
    "describe": (
        "describe the picture", "describe the image", "what is in the picture",
        "what is in the image", "what do you see",
        "describe what you see", "what does the picture show", "what can you see",
        "describe this picture", "what is in this picture",
    ),
}  # fmt: skip
# words beside the phrasings; both spellings of "center", in this order
EXTRA_WORDS = (
    "yes no a an and , ? . the number word any something anything center centre please it this "
    "that s ' i"
)
NOUNS = ("object", "shape", "thing", "one")


@dataclass
class Turn:
    """One question, its answer and its kind (one of KINDS)."""

    question: str
    answer: str
    kind: str


def with_article(phrase: str) -> str:
    """'red circle' -> 'a red circle'."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def plural(noun: str) -> str:
    """The plural of a shape or of one of NOUNS."""
    return {"cross": "crosses"}.get(noun, noun + "s")


def description(scene: Scene) -> str:
    """The canonical description: objects from left to right, then the text."""
    parts = [with_article(f"{thing.color} {thing.shape}") for thing in scene.objects]
    if scene.text is not None:
        text = scene.text.text.lower()
        parts.append((NUMBER_PHRASE if text.isdigit() else WORD_PHRASE).format(text))
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


class Asker:
    """Asks about one scene. Every method returns a Turn, or None if such a question has no unique
    answer.
    """

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene, self.rng = scene, rng
        self.objects = scene.objects
        self.shapes = Counter(thing.shape for thing in self.objects)
        self.colors = Counter(thing.color for thing in self.objects)
        self.pairs = Counter((thing.color, thing.shape) for thing in self.objects)
        self.seen_colors = set(self.colors) | (
            {scene.text.color} if scene.text is not None else set()
        )

    def pick(self, items):
        return items[self.rng.integers(len(items))]

    def noun(self) -> str:
        return self.pick(NOUNS)

    def style(self, words: str) -> str:
        """Vary spelling, capitals and the question mark."""
        draw = self.rng.random(4)
        if draw[0] < 0.5:
            words = words.replace("colour", "color")
        if draw[1] < 0.6:
            words = words[0].upper() + words[1:]
        elif draw[1] < 0.65:
            words = words.upper()
        asks = not words.lower().startswith(("count", "describe", "read", "tell", "name"))
        if draw[2] < 0.75:
            words += "?" if asks else "."
        return words

    def turn(self, phrasing: str, kind: str, answer: str, *fill: str) -> Turn:
        return Turn(self.style(self.pick(PHRASINGS[phrasing]).format(*fill)), answer, kind)

    def reference(self, thing: Thing, hide: str = "") -> str | None:
        """An unambiguous reference to an object, without its `hide` ("color" or "shape")."""
        choices = []
        if hide != "shape" and self.shapes[thing.shape] == 1:
            choices.append(thing.shape)
        if hide != "color" and self.colors[thing.color] == 1 and self.unlike_text(thing.color):
            choices.append(f"{thing.color} {self.noun()}")
        if not hide and self.pairs[thing.color, thing.shape] == 1:
            choices += [f"{thing.color} {thing.shape}"] * 2
        if hide and len(self.objects) == 1 and self.scene.text is None and self.rng.random() < 0.3:
            choices.append(self.pick(NOUNS[:3]))
        return self.pick(choices) if choices else None

    def unlike_text(self, color: str) -> bool:
        return self.scene.text is None or self.scene.text.color != color

    def color(self) -> Turn | None:
        thing = self.pick(self.objects)
        words = self.reference(thing, hide="color")
        return words and self.turn("color", "color", thing.color, words)

    def shape(self) -> Turn | None:
        thing = self.pick(self.objects)
        if (
            self.colors[thing.color] == 1
            and self.unlike_text(thing.color)
            and self.rng.random() < 0.3
        ):
            return self.turn("shape_adjective", "shape", thing.shape, thing.color)
        words = self.reference(thing, hide="shape")
        return words and self.turn("shape", "shape", thing.shape, words)

    def where(self) -> Turn | None:
        thing = self.pick(self.objects)
        words = self.reference(thing)
        if words is None or thing.position is None:
            return None
        return self.turn("where", "where", thing.position, words)

    def exists(self) -> Turn | None:
        wanted = bool(self.rng.integers(2))
        if self.rng.random() < 0.2 and self.objects:
            return self.is_color(wanted)
        color, shape = (
            self._wanted(wanted) if self.objects else (self.pick(COLORS), self.pick(SHAPES))
        )
        if not self.objects or (color and not shape and not wanted and not self.unlike_text(color)):
            return None
        noun = shape or self.pick(NOUNS[:3])
        words = f"{color} {noun}" if color else noun
        answer = "yes" if wanted else "no"
        if self.rng.random() < 0.15:
            return self.turn(
                "exists_plural",
                "exists",
                answer,
                f"{color} {plural(noun)}" if color else plural(noun),
            )
        if not shape and self.rng.random() < 0.3:
            return self.turn(
                "exists",
                "exists",
                answer,
                f"anything {color}" if self.rng.random() < 0.5 else f"something {color}",
            )
        return self.turn("exists", "exists", answer, with_article(words))

    def _wanted(self, present: bool) -> tuple[str, str]:
        """A present or absent (color, shape); either may be "". Absent ones mostly share one of the
        two with an object.
        """
        thing, form = self.pick(self.objects), self.rng.random()
        absent_shapes = [shape for shape in SHAPES if shape not in self.shapes]
        absent_colors = [color for color in COLORS if color not in self.seen_colors]
        if form < 0.25:
            return "", thing.shape if present else (
                self.pick(absent_shapes) if absent_shapes else ""
            )
        if form < 0.45:
            return (thing.color if present else self.pick(absent_colors)), ""
        if present:
            return thing.color, thing.shape
        if form < 0.7:
            return thing.color, self.pick([s for s in SHAPES if (thing.color, s) not in self.pairs])
        if form < 0.92:
            return self.pick([c for c in COLORS if (c, thing.shape) not in self.pairs]), thing.shape
        return self.pick(absent_colors), (
            self.pick(absent_shapes) if absent_shapes else thing.shape
        )

    def is_color(self, wanted: bool) -> Turn | None:
        thing = self.pick(self.objects)
        if self.shapes[thing.shape] != 1:
            return None
        others = [c for c in (list(self.colors) * 3 + COLORS) if c != thing.color]
        return self.turn(
            "is_color",
            "exists",
            "yes" if wanted else "no",
            thing.shape,
            thing.color if wanted else self.pick(others),
        )

    def count(self) -> Turn | None:
        form = self.rng.random()
        if form < 0.4 or not self.objects:
            return self.turn("count_all", "count", str(len(self.objects)))
        thing = self.pick(self.objects)
        if self.rng.random() < 0.12:  # an absent shape
            absent = [shape for shape in SHAPES if shape not in self.shapes]
            return (
                self.turn("count_some", "count", "0", plural(self.pick(absent))) if absent else None
            )
        if form < 0.7:
            return self.turn(
                "count_some", "count", str(self.shapes[thing.shape]), plural(thing.shape)
            )
        if form < 0.9:
            if not self.unlike_text(thing.color):
                return None
            return self.turn(
                "count_some",
                "count",
                str(self.colors[thing.color]),
                f"{thing.color} {plural(self.pick(NOUNS[:3]))}",
            )
        return self.turn(
            "count_some",
            "count",
            str(self.pairs[thing.color, thing.shape]),
            f"{thing.color} {plural(thing.shape)}",
        )

    def text(self) -> Turn | None:
        if self.scene.text is None:
            return None
        text = self.scene.text.text.lower()
        kind = "number" if text.isdigit() else "word"
        return self.turn("text" if self.rng.random() < 0.2 else kind, kind, text)

    def describe(self) -> Turn:
        return self.turn("describe", "describe", description(self.scene))


# frequencies of the kinds, for images with objects
WEIGHTS = {"color": 0.23, "shape": 0.22, "where": 0.18, "exists": 0.24, "count": 0.13}


def ask(
    scene: Scene,
    rng: np.random.Generator,
    turns: int,
    describe: float = 0.5,
    weights: dict[str, float] | None = None,
) -> list[Turn]:
    """Up to `turns` different turns about one scene, in random order.

    A description reveals all later answers, so it comes last, with probability `describe`.
    """
    weights = weights or WEIGHTS
    asker, asked, seen = Asker(scene, rng), [], set()
    names, shares = list(weights), np.array(list(weights.values()))
    shares = shares / shares.sum()
    describes = rng.random() < describe
    if scene.text is not None:
        asked.append(asker.text())
    attempts = 3 * turns if scene.objects else 2
    for name in (names[i] for i in rng.choice(len(names), size=attempts, p=shares)):
        if len(asked) >= turns - describes:
            break
        turn = getattr(asker, name)() if scene.objects else asker.count()
        if turn and (turn.question.lower().strip("?.").replace("color", "colour") not in seen):
            seen.add(turn.question.lower().strip("?.").replace("color", "colour"))
            asked.append(turn)
    order = rng.permutation(len(asked))
    asked = [asked[i] for i in order]
    if describes or not asked:
        asked.append(asker.describe())
    return asked


def vocabulary() -> list[str]:
    """Every word of questions and answers, except printed words, in a fixed order."""
    words: dict[str, None] = {}
    for phrase in (*(p for group in PHRASINGS.values() for p in group), *EXTRA_WORDS.split()):
        for word in phrase.replace("{}", " ").replace("'", " ").split():
            words[word] = None
            if "colour" in word:
                words[word.replace("colour", "color")] = None
    for name in (*COLORS, *SHAPES, *map(plural, SHAPES), *NOUNS, *map(plural, NOUNS), *POSITIONS):
        words[name] = None
    return list(words)
