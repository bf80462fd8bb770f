"""The tiled encoder against transformers', with every gate and table random."""

import pytest
import torch
from transformers import MllamaVisionModel
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

import tiny
from mllama.encoders.tiled_layers import order_tokens
from mllama.encoders.tiled_vit import TiledImageEncoder, group_images
from tiny.batches import tiles

TWO_TILES = {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}


def encoders(**options) -> tuple[TiledImageEncoder, MllamaVisionModel]:
    """Ours, and stock transformers' with the same weights."""
    config = MllamaVisionConfig(**tiny.tiled_vision(hidden_size=64, intermediate_size=96) | options)
    ours = tiny.randomize(TiledImageEncoder(config)).eval()
    theirs = MllamaVisionModel(config).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, [[1], [3]]),
        ({}, [[6, 2], [1, 0], [5, 4]]),  # two images, and a row with one
        ({"attention_heads": 4, "image_size": 24}, [[4, 7]]),
        (
            {"hidden_size": 96, "attention_heads": 4, "vision_output_dim": 288, "num_channels": 1},
            [[8], [0]],
        ),
        (
            TWO_TILES
            | {
                "image_size": 32,
                "num_global_layers": 1,
                "vision_output_dim": 128,
                "intermediate_layers_indices": [1],
            },
            [[1, 2, 3]],
        ),
    ],
)
def test_features_equal_transformers(options, ids):
    ours, theirs = encoders(**options)
    inputs = tiles(ours.config, ids)
    with torch.no_grad():
        got, expected = (
            ours(*inputs, reference="hf").last_hidden_state,
            theirs(*inputs).last_hidden_state,
        )
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_metas_features_are_the_inputs_of_the_layers():
    """Transformers with every index one lower, where there is a lower one, gives what Meta's order
    gives.
    """
    ours, theirs = encoders(intermediate_layers_indices=[1, 2])
    inputs = tiles(ours.config, [[6, 2], [1, 0]])
    theirs.intermediate_layers_indices = [0, 1]
    with torch.no_grad():
        got, expected = (
            ours(*inputs, reference="meta").last_hidden_state,
            theirs(*inputs).last_hidden_state,
        )
    assert not got[1, 1].any()  # no image
    expected[1, 1] = 0
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gradients_equal_transformers():
    ours, theirs = encoders()
    inputs = tiles(ours.config, [[6, 2], [1, 0]])
    weigh = None
    for model in (ours, theirs):
        features = (
            model(*inputs, reference="hf") if model is ours else model(*inputs)
        ).last_hidden_state
        weigh = torch.randn_like(features) if weigh is None else weigh
        (features * weigh).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        error, scale = (
            (parameter.grad - expected[name].grad).abs().max(),
            expected[name].grad.abs().max(),
        )
        assert error <= 1e-4 * scale, name


def test_gradient_checkpointing_changes_no_gradient():
    encoder = encoders()[0].train()
    inputs = tiles(encoder.config, [[2, 2]])

    def gradients() -> list[torch.Tensor]:
        encoder.zero_grad()
        encoder(*inputs).last_hidden_state.square().mean().backward()
        return [parameter.grad for parameter in encoder.parameters()]

    plain, calls = gradients(), []
    for layer in (*encoder.transformer.layers, *encoder.global_transformer.layers):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda *args: (
            calls.append(1) or torch.utils.checkpoint.checkpoint(*args, use_reentrant=False)
        )
    assert all(map(torch.equal, plain, gradients())) and len(calls) == 5


def test_bfloat16_rounds_no_more_than_theirs():
    """On weights and pixels that bfloat16 holds exactly."""
    ours, theirs = (
        encoder.bfloat16() for encoder in encoders(hidden_size=128, vision_output_dim=384)
    )
    pixels, *rest = tiles(ours.config, [[6, 2], [1, 3]])
    pixels = pixels.bfloat16()
    with torch.no_grad():
        got, expected = (
            ours(pixels, *rest, reference="hf").last_hidden_state,
            theirs(pixels, *rest).last_hidden_state,
        )
        exact = theirs.float()(pixels.float(), *rest).last_hidden_state
    assert got.dtype == torch.bfloat16
    assert (
        0 < (got - exact).square().mean().sqrt() <= 1.2 * (expected - exact).square().mean().sqrt()
    )


def test_probabilities_hide_padding_from_padding_only():
    encoder = encoders()[0]
    inputs = tiles(encoder.config, [[2, 6, 0]])
    with torch.no_grad():
        encoded = encoder(*inputs, output_attentions=True)
        assert torch.equal(encoded.last_hidden_state, encoder(*inputs).last_hidden_state)
    assert len(encoded.attentions) == 5
    tokens = torch.zeros(2, 4, 8, dtype=torch.bool)  # 5 patches with the class token, padded to 8
    tokens[0, :2, :5] = tokens[1, :, :5] = True
    real = tokens.flatten(1)
    for weights in encoded.attentions:
        assert weights.shape == (3, 2, 32, 32) and not weights[2].any()  # no image
        weights = weights[:2]
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 32))
        seen = real[:, None, :, None] | real[:, None, None, :]
        assert torch.equal(weights > 0, seen.expand_as(weights))


def test_ids_tell_which_tiles_are_filled():
    encoder = encoders()[0]
    pixels, ids, mask = tiles(encoder.config, [[1, 6], [3, 0]])
    assert torch.equal(
        encoder(pixels, ids).last_hidden_state, encoder(pixels, ids, mask).last_hidden_state
    )


def test_no_images_give_no_features():
    encoder = encoders()[0]
    pixels, ids, mask = tiles(encoder.config, [[1]])
    assert encoder(pixels[:, :0], ids[:, :0], mask[:, :0]).last_hidden_state.shape == (
        1,
        0,
        4,
        5,
        192,
    )


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (
            TypeError,
            "pixel_values",
            {"pixel_values": torch.zeros(1, 1, 4, 3, 16, 16, dtype=torch.uint8)},
        ),
        (ValueError, "pixel_values", {"pixel_values": torch.zeros(1, 1, 2, 3, 16, 16)}),
        (ValueError, "pixel_values must be", {"pixel_values": torch.zeros(1, 4, 3, 16, 16)}),
        (TypeError, "aspect_ratio_ids must be", {"aspect_ratio_ids": None}),
        (TypeError, "aspect_ratio_ids must be", {"aspect_ratio_ids": torch.ones(1, 1)}),
        (
            ValueError,
            "aspect_ratio_ids must be",
            {"aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long)},
        ),
        (IndexError, "aspect_ratio_ids", {"aspect_ratio_ids": torch.tensor([[9]])}),
        (TypeError, "aspect_ratio_mask must be", {"aspect_ratio_mask": [1]}),
        (ValueError, "aspect_ratio_mask must be", {"aspect_ratio_mask": torch.ones(1, 1, 2)}),
        (ValueError, "reference must be", {"reference": "torchtune"}),
    ],
)
def test_other_input_is_refused(error, match, change):
    encoder = encoders()[0]
    pixels, ids, mask = tiles(encoder.config, [[1]])
    with pytest.raises(error, match=match):
        encoder(
            **{"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask} | change
        )


def converted(**options) -> TiledImageEncoder:
    """An encoder whose tables hold zeros for tiles that an arrangement has not, as released ones
    do.
    """
    encoder = encoders(**options)[0]
    config = encoder.config
    counts = torch.tensor(
        [0] + [rows * columns for rows, columns in config.supported_aspect_ratios]
    )
    unused = torch.arange(config.max_num_tiles) >= counts[:, None]
    position, before, after = (
        encoder.gated_positional_embedding,
        encoder.pre_tile_positional_embedding,
        encoder.post_tile_positional_embedding,
    )
    with torch.no_grad():
        for table in (position.tile_embedding, before.embedding, after.embedding):
            table.weight.unflatten(1, (config.max_num_tiles, -1))[unused] = 0
    return encoder


@pytest.mark.parametrize("reference", ["meta", "hf"])
def test_equal_empty_tiles_are_computed_once(reference):
    encoder, seen = converted(), []
    for layer in (encoder.transformer.layers[0], encoder.global_transformer.layers[0]):
        layer.register_forward_hook(lambda layer, args, out: seen.append(args[0].shape[1]))
    inputs = tiles(encoder.config, [[1, 2, 6]])
    with torch.no_grad():
        once = encoder(*inputs, reference).last_hidden_state
        assert sorted(seen) == [
            16,
            16,
            24,
            24,
            32,
            32,
        ]  # one, two and four tiles filled, one in the place of the empty ones; 8 tokens each
        seen.clear()
        plain = encoder(*inputs, reference, output_attentions=True).last_hidden_state
        assert seen == [32] * 6
    assert (once - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert torch.equal(once[0, 0, 1], once[0, 0, 2]) and not torch.equal(
        once[0, 0, 0], once[0, 0, 1]
    )


def test_other_empty_tiles_are_computed_each():
    """Where tables tell them apart, before the first layer or before the global ones, and where
    such a table is trained.
    """
    for change in ("pre_tile_positional_embedding", "post_tile_positional_embedding", "trained"):
        encoder, seen = converted(), []
        encoder.requires_grad_(False)
        for layer in (encoder.transformer.layers[0], encoder.global_transformer.layers[0]):
            layer.register_forward_hook(
                lambda layer, args, out, seen=seen: seen.append(args[0].shape[1])
            )
        if change == "trained":
            encoder.post_tile_positional_embedding.gate.requires_grad_()
        else:
            getattr(encoder, change).embedding.weight.data[1, -1] += 1
        encoder(*tiles(encoder.config, [[1]]))
        assert seen == ([16, 32] if change.startswith("post") else [32, 32]), change


def test_adapters_get_the_same_gradients_from_equal_empty_tiles():
    encoder = converted()
    encoder.requires_grad_(False)
    adapted = [
        layer.self_attn.v_proj.weight
        for layer in (*encoder.transformer.layers, *encoder.global_transformer.layers)
    ]
    for weight in adapted:
        weight.requires_grad_()
    inputs = tiles(encoder.config, [[1, 2]])
    gradients = []
    for options in ({}, {"output_attentions": True}):
        features = encoder(*inputs, **options).last_hidden_state
        weigh = torch.randn(features.shape, generator=torch.Generator().manual_seed(4))
        gradients.append(torch.autograd.grad((features * weigh).sum(), adapted))
    for once, plain in zip(*gradients, strict=True):
        assert (once - plain).abs().max() <= 1e-4 * plain.abs().max()


def test_tokens_go_to_their_places_and_back():
    tile_mask = torch.tensor([True, False, False])
    for once, length in ((False, 12), (True, 8)):
        order, back, real = order_tokens((3, 4), tile_mask, 3, once)
        assert (len(order), real, order[:3].tolist()) == (length, 3, [0, 1, 2])
        found = order[back]
        if once:  # the second empty tile is the first
            assert found.tolist() == [*range(8), *range(4, 8)]
        else:
            assert found.tolist() == [*range(12)]


def test_images_with_the_same_tiles_go_together():
    ids = torch.tensor([2, 0, 1, 2])
    tile_mask = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1]]).bool()
    groups = [
        (chosen.tolist(), tiles.tolist()) for chosen, tiles in group_images(ids, tile_mask, "meta")
    ]
    assert sorted(groups) == [([0, 3], [True, True]), ([2], [True, False])]
    groups = [chosen.tolist() for chosen, _ in group_images(ids, tile_mask, "hf")]
    assert sorted(groups) == [[0, 3], [1, 2]]
