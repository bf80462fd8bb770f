"""Fusions by themselves: no encoder, decoder or transformers around them."""

import pytest
import torch
from torch import nn

from mllama.config.spec import ModelSpec, TextSpec, VisionSpec, uniform_layers
from mllama.fusion import make_fusion
from mllama.fusion.base import ModelInputs, Parts
from mllama.nn.kv_cache import KVCache

B, H, N, IMAGE = 2, 8, 3, 9  # rows, hidden, features of an image, the placeholder's id


def fusion(kind, image_token_index=IMAGE, cross=()):
    layers = uniform_layers(2, {"rope_theta": 1e4}, cross)
    text = TextSpec(10, H, 16, 2, 2, 4, layers)
    vision = VisionSpec(8, 16, 1, 2, 3, 16, 8)
    encoder = kind and "siglip"
    return make_fusion(
        ModelSpec(
            text,
            encoder=encoder,
            vision=vision,
            fusion=kind,
            tokens_per_image=N,
            image_token_index=image_token_index,
        )
    )


def parts():
    torch.manual_seed(0)
    return Parts(nn.Embedding(10, H), None, None)


def prepare(kind, ids, images=0, mask=None, **given):
    torch.manual_seed(1)
    features = torch.randn(images, N, H) if images else None
    inputs = ModelInputs(torch.tensor(ids), image_features=features, attention_mask=mask, **given)
    return fusion(kind).prepare(inputs, mask, parts()), features


def test_text_alone():
    ids = [[1, 2], [3, 4]]
    prepared, _ = prepare(None, ids)
    torch.testing.assert_close(prepared.embeds, parts().embedding(torch.tensor(ids)))
    with pytest.raises(ValueError, match="image_features"):
        prepare(None, ids, images=1)


def test_merge_writes_features_at_placeholders():
    ids = [[1, IMAGE, IMAGE, IMAGE, 2], [IMAGE, IMAGE, IMAGE, 3, 4]]
    prepared, features = prepare("merge", ids, images=2)
    assert prepared.placeholders.tolist() == [[i == IMAGE for i in row] for row in ids]
    torch.testing.assert_close(prepared.embeds[0, 1:4], features[0])
    torch.testing.assert_close(prepared.embeds[1, :3], features[1])
    torch.testing.assert_close(prepared.embeds[1, 3:], parts().embedding(torch.tensor([3, 4])))


@pytest.mark.parametrize(
    "ids", [[[1, IMAGE, IMAGE]], [[IMAGE] * 6], [[1, 2, 3]]], ids=["fewer", "more", "none"]
)
def test_merge_refuses_other_numbers_of_placeholders(ids):
    with pytest.raises(ValueError, match="input_ids"):
        prepare("merge", ids, images=1)


def test_merge_refuses_an_image_across_rows():
    with pytest.raises(ValueError, match="every row"):
        prepare("merge", [[IMAGE] * 4, [IMAGE, IMAGE, 1, 2]], images=2)


def test_ids_from_text_start_on_are_text():
    ids = [[IMAGE, IMAGE, IMAGE, 1, IMAGE]]
    prepared, _ = prepare("merge", ids, images=1, text_start=3)
    assert prepared.placeholders.tolist() == [[True, True, True, False, False]]
    torch.testing.assert_close(prepared.embeds[0, 4], parts().embedding.weight[IMAGE])


def test_prepend_extends_what_comes_with_the_text():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    prepared, features = prepare(
        "prepend",
        [[0, 1, 2], [3, 4, 5]],
        images=2,
        mask=mask,
        position_ids=torch.tensor([[0, 0, 1], [0, 1, 2]]),
        labels=torch.tensor([[1, 2, 3], [4, 5, 6]]),
    )
    assert prepared.num_prefix_tokens == N
    torch.testing.assert_close(prepared.embeds[:, :N], features)
    assert prepared.padding_mask.tolist() == [[1, 1, 1, 0, 1, 1], [1] * 6]
    assert prepared.position_ids.tolist() == [[0, 1, 2, 3, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert prepared.labels[:, :N].eq(-100).all() and prepared.labels[1, N:].tolist() == [4, 5, 6]


def test_prepend_writes_at_placeholders_where_there_are_some():
    prepared, features = prepare("prepend", [[1, IMAGE, IMAGE, IMAGE]], images=1)
    assert prepared.num_prefix_tokens == 0
    torch.testing.assert_close(prepared.embeds[0, 1:], features[0])


def test_prepend_notes_its_tokens_on_the_cache():
    cache = KVCache(2)
    prepare("prepend", [[1, 2], [3, 4]], images=4, cache=cache)
    assert cache.num_prefix_tokens == 2 * N
    with pytest.raises(ValueError, match="images"):
        prepare("prepend", [[1, 2], [3, 4]], images=3)


def test_cross_attention_shares_images_out_to_the_rows():
    inputs = ModelInputs(torch.tensor([[1, 2], [3, 4]]), image_features=torch.randn(4, N, H))
    prepared = fusion("cross_attention", cross=(1,)).prepare(inputs, None, parts())
    assert prepared.cross.states.shape == (B, 2 * N, H)
    torch.testing.assert_close(prepared.cross.states[1, N:], inputs.image_features[3])
    assert prepared.cross.tile_mask.tolist() == [True] * 2
    torch.testing.assert_close(prepared.embeds, parts().embedding(inputs.input_ids))


@pytest.mark.parametrize(
    ("kind", "extra", "obstacle", "needed"),
    [
        (None, 0, False, 0),
        ("merge", 0, False, N),
        ("prepend", 2 * N, True, 0),
        ("cross_attention", 0, False, 0),
        ("tiled_cross_attention", 0, False, 1),
    ],
)
def test_what_generation_asks(kind, extra, obstacle, needed):
    made = fusion(kind)
    assert made.extra_cache_tokens(4, 2) == extra
    assert (made.chunk_obstacle is not None) == obstacle
    assert made.placeholders_per_image == needed
    assert made.stands_before_text(torch.tensor([[1, 2]]), None, 1) == (kind == "prepend")


@pytest.mark.parametrize("kind", ["merge", "prepend"])
def test_images_follow_their_rows(kind):
    ids = torch.tensor([[IMAGE] * 6, [1] * 6, [1, *[IMAGE] * 3, 1, 1]])
    per_row = fusion(kind).images_per_row(ids, None, None, torch.zeros(3, N, H), parts().embedding)
    assert per_row == [2, 0, 1]


def test_images_without_placeholders_are_shared_out():
    ids, features = torch.tensor([[1, 2], [3, 4]]), torch.zeros(4, N, H)
    for kind in ("prepend", "cross_attention"):
        assert fusion(kind).images_per_row(ids, None, None, features, None) == [2, 2]


def test_ids_outside_the_vocabulary():
    with pytest.raises(IndexError, match="input_ids"):
        prepare("merge", [[1, 10]])
