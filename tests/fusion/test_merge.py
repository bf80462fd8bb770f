"""Telling the placeholder from its runs, and writing features in its place."""

import pytest
import torch

from mllama.fusion.merge import find_placeholder, merge


@pytest.mark.parametrize(
    ("rows", "mask", "images", "found"),
    [
        ([[9, 9, 9, 1, 2]], None, 1, 9),
        ([[1, 9, 9, 9, 9, 9, 9, 2]], None, 2, 9),  # two images side by side
        ([[9, 9, 9, 1, 9, 9, 9]], None, 2, 9),
        ([[9, 9, 9, 1], [1, 2, 3, 4]], None, 1, 9),  # a row without
        ([[1, 9, 9, 9], [9, 9, 9, 1]], None, 2, 9),  # a run does not cross into the next row
        ([[9, 9, 1, 2]], None, 1, None),
        ([[9, 1, 2, 3]], None, 1, None),  # unexpanded
        ([[9, 9, 9, 1, 9]], None, 1, None),  # a run of another length
        ([[0, 0, 0, 9, 9, 9, 1]], [[0, 0, 0, 1, 1, 1, 1]], 1, 9),  # padding stands in runs too
        (
            [[0, 0, 0, 9, 9, 9, 1], [1, 2, 3, 4, 5, 6, 7]],
            None,
            1,
            ValueError,
        ),  # not known to be padding: it could be either
        ([[9, 9, 9, 9, 9, 9, 8, 8, 8]], None, 2, 9),  # told apart by their number
        ([[9, 9, 9, 8, 8, 8]], None, 3, ValueError),
    ],
)
def test_find_placeholder(rows, mask, images, found):
    arguments = (torch.tensor(rows), None if mask is None else torch.tensor(mask), 3, images)
    if found is ValueError:
        with pytest.raises(ValueError, match="image_token_index"):
            find_placeholder(*arguments)
    else:
        assert find_placeholder(*arguments) == found


def test_merge_writes_features_in_row_order():
    embeds = torch.zeros(2, 4, 2, dtype=torch.bfloat16)
    placeholders = torch.tensor([[False, True, True, False], [True, False, False, True]])
    features = torch.arange(8.0).view(2, 2, 2).requires_grad_()
    merged = merge(embeds, placeholders, features)
    assert merged.dtype == torch.bfloat16
    assert (
        torch.equal(merged[placeholders].float(), features.detach().view(4, 2))
        and not merged[~placeholders].any()
    )
    merged.sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))
