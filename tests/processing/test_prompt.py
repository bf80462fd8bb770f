import numpy as np
import pytest
import torch

from mllama.processing.prompt import LOCATION_TOKENS, lay_out, share_out


@pytest.mark.parametrize(
    ("prompt", "bos", "expected"),
    [
        ("How many?", "<s>", "<image><image><s>How many?\n"),
        ("How many?", None, "<image><image>How many?\n"),
        ("<s>How many?\n", "<s>", "<image><image><s>How many?\n"),
        ("", "<s>", "<image><image><s>\n"),
    ],
)
def test_layout(prompt, bos, expected):
    assert lay_out(prompt, 2, bos_token=bos) == expected


def test_layout_without_images():
    assert lay_out("Hello", 0, bos_token="<s>") == "<s>Hello\n"


def test_location_tokens():
    assert len(set(LOCATION_TOKENS)) == 1024 + 128
    assert LOCATION_TOKENS[0] == "<loc0000>" and LOCATION_TOKENS[1023] == "<loc1023>"
    assert LOCATION_TOKENS[1024] == "<seg000>" and LOCATION_TOKENS[-1] == "<seg127>"


@pytest.mark.parametrize(
    ("images", "placeholders", "expected"),
    [
        (None, [None], [[]]),
        (None, [None, None], [[], []]),
        ("a", [None], [["a"]]),
        (["a", "b"], [None], [["a", "b"]]),
        (("a", "b"), [None, None], [["a"], ["b"]]),
        (["a", "b", "c"], [2, 1], [["a", "b"], ["c"]]),
        (["a", "b", "c"], [1, None, 2], [["a"], [], ["b", "c"]]),
        ([["a"], None, []], [None, None, None], [["a"], [], []]),
        ([["a", "b"], "c"], [2, None], [["a", "b"], ["c"]]),
        ([["a", "b"]], [None], [["a", "b"]]),
    ],
)
def test_who_gets_which_image(images, placeholders, expected):
    assert share_out(images, placeholders) == expected


@pytest.mark.parametrize("batch", [np.zeros((2, 4, 4, 3)), torch.zeros(2, 3, 4, 4)])
def test_an_array_of_images(batch):
    rows = share_out(batch, [None, None])
    assert [len(row) for row in rows] == [1, 1] and rows[0][0].shape == batch.shape[1:]


@pytest.mark.parametrize(
    ("images", "placeholders", "match"),
    [
        (["a"], [2], r"1 prompt\(s\) hold 2 <image> placeholder\(s\) in all, but got 1 image"),
        (None, [1, 1], r"2 prompt\(s\) hold 2 <image> placeholder\(s\) in all, but got 0 image"),
        (["a", "b"], [1, None], r"hold 1 <image> placeholder\(s\) in all, but got 2 image"),
        (["a"], [0], r"hold 0 <image> placeholder\(s\) in all, but got 1 image"),
        (["a", "b", "c"], [None, None], "3 image.* for 2 prompts"),
        ([["a"], ["b"]], [None], "2 lists of images for 1 prompt"),
        ([["a"], ["b"]], [1, 2], r"prompt 1 holds 2 <image> placeholder\(s\), but got 1 image"),
        ([["a"], ["b"]], [1, 0], r"prompt 1 holds 0 <image> placeholder\(s\), but got 1 image"),
    ],
)
def test_numbers_that_do_not_match(images, placeholders, match):
    with pytest.raises(ValueError, match=match):
        share_out(images, placeholders)
