"""What is trained of each row: its tokens with their roles, and figures over many rows."""

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from mllama.data.collate import Collator
from mllama.data.encoded import EncodedRow
from mllama.data.rows import Example
from mllama.hf.processors.chat import IGNORED
from mllama.processing.messages import ASSISTANT

IMAGE, TEMPLATE = "image", "template"
_BROKEN = "\ufffd"  # what a decoder writes for a part of a character
_MOST_TOKENS = 8  # of one character


@dataclass(frozen=True)
class Token:
    """A token of a row.

    Attributes:
        place: its index.
        id: its id.
        text: what it stands for; empty if it is a part of a character that a later one ends.
        role: "system", "user" or "assistant", whose text it is a part of; "image"; or "template".
            What is trained is the assistant's.
        trained: whether it has a label, which is its id.
    """

    place: int
    id: int
    text: str
    role: str
    trained: bool


def label_tokens(example: Example, row: EncodedRow, collator: Collator) -> list[Token]:
    """The tokens of an encoded example.

    Roles of tokens that are not trained are found by the messages' texts, without case and white
    space: a text that the chat template changes otherwise counts as the template's.
    """
    ids = row.input_ids.tolist()
    trained = (row.labels != IGNORED).tolist()
    is_image = [token == collator.image_token_id for token in ids]
    texts = [
        "" if image else text for image, text in zip(is_image, _texts(collator, ids), strict=True)
    ]
    roles = _roles(example.messages, texts)
    name = getattr(collator.processor, "image_token", None) or IMAGE
    return [
        Token(
            place,
            ids[place],
            name if is_image[place] else texts[place],
            IMAGE if is_image[place] else ASSISTANT if trained[place] else roles[place],
            trained[place],
        )
        for place in range(len(ids))
    ]


def _texts(collator: Collator, ids: Sequence[int]) -> list[str]:
    """The text of each token; that of a character of several tokens is the last one's."""
    texts: list[str] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = collator.tokenizer.decode(pending)
        if text.endswith(_BROKEN) and len(pending) < _MOST_TOKENS:
            texts.append("")
        else:
            texts.append(text)
            pending = []
    return texts


def _roles(messages: list[dict], texts: Sequence[str]) -> list[str]:
    """The role of each token by the messages' texts."""
    squeezed = [_squeeze(text) for text in texts]
    whole, spans, found = "".join(squeezed), list[tuple[int, int, str]](), 0
    for message in messages:
        for part in message["content"]:
            text = _squeeze(part.get("text", ""))
            start = whole.find(text, found) if text else -1
            if start >= 0:
                found = start + len(text)
                spans.append((start, found, message["role"]))
    roles, at = [], 0
    for text, own in zip(texts, squeezed, strict=True):
        end = at + len(own)
        if text and not own:  # white space belongs to what is around it
            inside = [role for first, last, role in spans if first < at < last]
        else:  # a part of a character to what follows
            inside = [role for first, last, role in spans if first < max(end, at + 1) and last > at]
        roles.append(inside[0] if inside else TEMPLATE)
        at = end
    return roles


def _squeeze(text: str) -> str:
    """A text for comparisons: tokenizers may change case, white space and the form of letters."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass
class Summary:
    """Figures over rows.

    Attributes:
        rows: number of rows that were encoded.
        tokens, trained, images, truncated: numbers of tokens, of those that are trained, of images,
            and of rows that max_length cut.
        ended: number of rows with an answer that ends with a token that generation stops at.
        longest: tokens of the longest row, and `longest_row` its name.
        bad_rows: what is wrong with each row that cannot be trained on.
    """

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    images: int = 0
    truncated: int = 0
    ended: int = 0
    longest: int = 0
    longest_row: str = ""
    bad_rows: list[str] = field(default_factory=list)

    def add(self, row: EncodedRow, ends: Collection[int]) -> None:
        """Count a row; `ends` are the ids that generation stops at."""
        self.rows += 1
        self.tokens += len(row)
        self.trained += int((row.labels != IGNORED).sum())
        self.images += row.num_images
        self.truncated += row.truncated > 0
        self.ended += not frozenset(ends).isdisjoint(row.labels.tolist())
        if len(row) > self.longest:
            self.longest, self.longest_row = len(row), row.where


def summarize(
    examples: Sequence[Example], collator: Collator, rows: int, ends: Collection[int] = ()
) -> Summary:
    """Encode the first `rows` examples. Bad ones are noted. `ends`: see `Summary.add`."""
    summary = Summary()
    for index in range(min(rows, len(examples))):
        try:
            summary.add(collator.encode(examples[index]), ends)
        except ValueError as error:
            summary.bad_rows.append(str(error))
    return summary


_COLORS = {"system": 35, "user": 36, ASSISTANT: 32, IMAGE: 33, TEMPLATE: 90}


def token_lines(tokens: Sequence[Token], colors: bool = False) -> Iterator[str]:
    """A table of tokens, one per line; those of an image are one line.

    Args:
        tokens: of one row.
        colors: color them by role, for a terminal.
    """
    yield f"{'place':>11} {'id':>7}  {'role':<9} {'label':>7}  text"
    for role, group in groupby(tokens, key=lambda token: token.role):
        run = list(group)
        for first, last in [(run[0], run[-1])] if role == IMAGE else zip(run, run, strict=True):
            place = str(first.place) if first is last else f"{first.place}-{last.place}"
            label = str(first.id) if first.trained else "-"
            count = "" if first is last else f" x {len(run)}"
            line = f"{place:>11} {first.id:>7}  {role:<9} {label:>7}  {first.text!r}{count}"
            yield f"\x1b[{_COLORS[role]}m{line}\x1b[0m" if colors else line


def count_roles(tokens: Sequence[Token]) -> dict[str, int]:
    """Number of tokens of each role, and of those that are trained."""
    counts = dict(Counter(token.role for token in tokens))
    return counts | {"trained": sum(token.trained for token in tokens)}
