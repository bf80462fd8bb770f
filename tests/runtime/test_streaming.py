"""Text of tokens as they come."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mllama.runtime.streaming import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes, id 256 being special."""

    def __init__(self):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
        self.inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.inner.decoder = decoders.ByteLevel()
        self.inner.add_special_tokens(["<end>"])

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text).ids

    def decode(self, ids, skip_special_tokens: bool) -> str:
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)


class Words:
    """As SentencePiece: a token's space stands before it, but not at the beginning of a text."""

    def decode(self, ids, skip_special_tokens: bool) -> str:
        return "".join(("_ab", "_c", "d", "_e")[i] for i in ids).replace("_", " ").lstrip(" ")


TEXT = "Grüße, 世界 👩‍👩‍👧 ok"


def test_characters_of_several_tokens_come_whole():
    tokenizer = Bytes()
    stream, ids = TextStream(tokenizer), tokenizer.encode(TEXT)
    pieces = [stream.put(token) for token in ids]
    assert len(ids) > len(TEXT) and "".join(pieces) == TEXT == stream.text and stream.end() == ""
    assert "\ufffd" not in "".join(pieces) and {len(piece) for piece in pieces} == {0, 1}


def test_what_never_becomes_a_character_is_written_at_the_end():
    tokenizer = Bytes()
    stream = TextStream(tokenizer)
    pieces = [stream.put(token) for token in tokenizer.encode("aß")[:-1]]
    assert pieces == ["a", ""] and stream.end() == "\ufffd" and stream.text == "a\ufffd"


def test_special_tokens_are_left_out():
    tokenizer = Bytes()
    stream = TextStream(tokenizer)
    ids = [*tokenizer.encode("a"), 256, *tokenizer.encode("b")]
    assert [stream.put(token) for token in ids] == ["a", "", "b"]


def test_spaces_between_words_stay():
    stream = TextStream(Words())
    assert [stream.put(token) for token in (0, 1, 2, 3, 0)] == ["ab", " c", "d", " e", " ab"]


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["END"], "one END two", "one "),
        (["END", "ne"], "one END", "o"),
        (["END"], "EN ENENDED", "EN EN"),
        (["ü"], "Grüße", "Gr"),
        (["zzz"], "zz z zz", "zz z zz"),
        (["x"], "xyz", ""),
    ],
)
def test_text_ends_before_a_stop_string(stop, text, expected):
    tokenizer = Bytes()
    stream = TextStream(tokenizer, stop)
    pieces = [stream.put(token) for token in tokenizer.encode(text)] + [stream.end()]
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == (expected != text)


def test_what_may_begin_a_stop_string_is_held_back():
    tokenizer = Bytes()
    stream = TextStream(tokenizer, ["abc"])
    assert [stream.put(token) for token in tokenizer.encode("xabab!")] == [
        "x", "", "", "ab", "", "ab!",
    ]  # fmt: skip
