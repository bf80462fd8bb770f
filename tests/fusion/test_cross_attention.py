"""Gated cross-attention against transformers' layer, with every gate and norm random."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.mllama.configuration_mllama import MllamaTextConfig as StockConfig
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    _prepare_cross_attention_mask,
)

import tiny
from mllama.config.spec import TextSpec, uniform_layers
from mllama.fusion.cross_attention import CrossAttentionDecoderLayer, cross_context
from mllama.hf.cache import TransformersCache
from mllama.hf.compat import CACHE_NAME
from mllama.hf.configs import MllamaTextConfig

TOKENS = 5  # keys of a tile
SPEC = TextSpec.of(MllamaTextConfig(**tiny.TEXT), layers=uniform_layers(2, {}, [1]))


def layers(**sizes) -> tuple[CrossAttentionDecoderLayer, MllamaCrossAttentionDecoderLayer]:
    """Ours, and stock transformers' with the same weights."""
    sizes = tiny.TEXT | sizes
    ours = tiny.randomize(
        CrossAttentionDecoderLayer(MllamaTextConfig(**sizes, rms_norm_eps=1e-5), 1)
    ).eval()
    sizes.pop("rope_theta")
    config = StockConfig(
        **sizes | {"bos_token_id": 1, "eos_token_id": 2},
        cross_attention_layers=[1],
        attn_implementation="eager",
    )
    theirs = MllamaCrossAttentionDecoderLayer(config, 1).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def stock(
    layer, hidden: torch.Tensor, states: torch.Tensor | None, mask: torch.Tensor | None, cache=None
) -> torch.Tensor:
    """What transformers computes."""
    rows = None
    if mask is not None:
        mask, rows = _prepare_cross_attention_mask(mask, TOKENS, hidden.dtype)
    return layer(hidden, states, mask, None, rows, **{CACHE_NAME: cache})


def example(
    images: int = 1, tiles: int = 4, rows: int = 2, length: int = 7
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states; features; a mask in which every row sees one image after the other, the
    first from its second position on.
    """
    hidden, states = torch.randn(rows, length, 64), torch.randn(rows, images * tiles * TOKENS, 64)
    mask = torch.zeros(rows, length, images, tiles)
    for row in range(rows):
        for image in range(images):
            start, end = (
                1 + row + 2 * image,
                length if image == images - 1 else 3 + row + 2 * image,
            )
            mask[row, start:end, image, : 1 + (row + image) % tiles] = 1
    return hidden, states, mask


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (4, 2)])
def test_the_layer_equals_transformers(heads, tiles, images):
    ours, theirs = layers(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    hidden, states, mask = example(images, tiles)
    with torch.no_grad():
        for masked in (mask, torch.ones_like(mask), None):
            got, _ = ours(hidden, cross=cross_context(states, masked, TOKENS, "hf"))
            assert relative(got, stock(theirs, hidden, states, masked)) <= 1e-5


def test_metas_blind_positions_stay_as_they_are_and_others_do_not_care():
    ours, _ = layers()
    hidden, states, mask = example()
    mask[1] = 0  # a row without an image
    with torch.no_grad():
        meta, _ = ours(hidden, cross=cross_context(states, mask, TOKENS))
        hf, _ = ours(hidden, cross=cross_context(states, mask, TOKENS, "hf"))
    blind = ~mask.flatten(2).any(-1)
    assert torch.equal(meta[blind], hidden[blind])
    assert (hf[blind] - hidden[blind]).abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(meta[~blind], hf[~blind])


@pytest.mark.parametrize("reference", ["meta", "hf"])
def test_what_is_hidden_has_no_part(reference):
    ours, _ = layers()
    hidden, states, mask = example()
    mask = mask[:, 3:]
    changed = torch.where(
        mask[:, -1].flatten(1).bool().repeat_interleave(TOKENS, 1)[..., None], states, 1e4
    )
    with torch.no_grad():
        got, expected = (
            ours(hidden[:, 3:], cross=cross_context(s, mask, TOKENS, reference))[0]
            for s in (changed, states)
        )
    assert torch.equal(got, expected)


def test_gradients_equal_transformers():
    ours, theirs = layers()
    hidden, states, mask = example(2)
    weigh = torch.randn_like(hidden)
    gradients = []
    for model in (ours, theirs):
        inputs = [hidden.clone().requires_grad_(), states.clone().requires_grad_()]
        if model is ours:
            out, _ = model(inputs[0], cross=cross_context(inputs[1], mask, TOKENS, "hf"))
        else:
            out = stock(model, *inputs, mask)
        names = sorted(dict(model.named_parameters()))
        gradients.append(
            torch.autograd.grad(
                (out * weigh).sum(),
                [*inputs, *(dict(model.named_parameters())[name] for name in names)],
            )
        )
    for place, pair in enumerate(zip(*gradients, strict=True)):
        assert relative(*pair) <= 1e-4, place


def test_gradient_checkpointing_changes_no_gradient():
    layer = layers()[0].train()
    hidden, states, mask = example(2)
    states.requires_grad_()

    def gradients() -> tuple[torch.Tensor, ...]:
        out, _ = layer(hidden, None, cross=cross_context(states, mask, TOKENS))
        return torch.autograd.grad(out.square().sum(), [states, *layer.parameters()])

    plain, calls = gradients(), []
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda *args: (
        calls.append(1) or torch.utils.checkpoint.checkpoint(*args, use_reentrant=False)
    )
    assert all(map(torch.equal, plain, gradients())) and calls


def test_bfloat16_rounds_no_more_than_theirs():
    """What the layer adds to the residual stream, on weights and inputs that bfloat16 holds
    exactly.
    """
    ours, theirs = (layer.bfloat16() for layer in layers())
    hidden, states, mask = example(2, rows=8)
    hidden, states = hidden.bfloat16(), states.bfloat16()
    with torch.no_grad():
        got, expected = (
            ours(hidden, cross=cross_context(states, mask, TOKENS, "hf"))[0],
            stock(theirs, hidden, states, mask),
        )
        exact = stock(theirs.float(), hidden.float(), states.float(), mask)
    assert got.dtype == torch.bfloat16
    assert (
        0 < (got - exact).square().mean().sqrt() <= 1.2 * (expected - exact).square().mean().sqrt()
    )


def test_probabilities_cover_what_is_seen():
    ours, _ = layers()
    hidden, states, mask = example(2)
    with torch.no_grad():
        plain, none = ours(hidden, cross=cross_context(states, mask, TOKENS))
        out, weights = ours(
            hidden, cross=cross_context(states, mask, TOKENS), output_attentions=True
        )
    assert none is None and torch.equal(plain, out)
    seen = mask.flatten(2).repeat_interleave(TOKENS, -1).bool()
    assert weights.shape == (2, 4, 7, 2 * 4 * TOKENS)
    assert torch.equal(weights > 0, seen[:, None].expand_as(weights))
    torch.testing.assert_close(weights.sum(-1), seen.any(-1).float()[:, None].expand(2, 4, 7))


def test_keys_are_computed_once_and_those_of_new_images_appended():
    ours, theirs = layers()
    hidden, states, mask = example(2)
    first = slice(0, 4 * TOKENS)
    cache, other = TransformersCache(DynamicCache(), SPEC), DynamicCache()
    with torch.no_grad():
        steps = [
            (hidden[:, :3], states[:, first], mask[:, :3, :1]),
            (hidden[:, 3:4], None, mask[:, 3:4, :1]),
            (hidden[:, 4:6], states[:, first.stop :], mask[:, 4:6]),
            (hidden[:, 6:], None, mask[:, 6:]),
        ]
        for x, new, seen in steps:
            cross = cross_context(new, seen, TOKENS, "hf", cached=cache.tile_mask)
            cache.tile_mask = cross.tile_mask
            got, _ = ours(x, None, cache, cross=cross)
            assert relative(got, stock(theirs, x, new, seen, other)) <= 1e-5
    assert cache.cache.layers[1].get_seq_length() == 8 * TOKENS


def test_tiles_that_are_empty_in_every_row_get_no_keys():
    ours, _ = layers()
    hidden, states, mask = example(
        2
    )  # the rows fill one and two tiles of the first image, two and three of the second
    filled = mask.any(1)
    mask[:, :4, 1] = 0  # it comes later
    first = slice(0, 4 * TOKENS)
    steps = [
        (hidden[:, :3], states[:, first], mask[:, :3, :1], filled[:, :1]),
        (hidden[:, 3:4], None, mask[:, 3:4, :1], None),
        (hidden[:, 4:6], states[:, first.stop :], mask[:, 4:6], filled[:, 1:]),
        (hidden[:, 6:], None, mask[:, 6:], None),
    ]
    with torch.no_grad():
        all_keys, _ = ours(hidden, cross=cross_context(states, mask, TOKENS))
        cross = cross_context(states, mask, TOKENS, aspect_ratio_mask=filled)
        assert cross.states.shape[1] == (2 + 3) * TOKENS
        torch.testing.assert_close(ours(hidden, cross=cross)[0], all_keys)
        cache, got = TransformersCache(DynamicCache(), SPEC), []
        for x, new, seen, tiles in steps:
            cross = cross_context(
                new, seen, TOKENS, cached=cache.tile_mask, aspect_ratio_mask=tiles
            )
            cache.tile_mask = cross.tile_mask
            got.append(ours(x, None, cache, cross=cross)[0])
        torch.testing.assert_close(torch.cat(got, 1), all_keys)
    assert cache.tile_mask.tolist() == [True, True, False, False, True, True, True, False]
    assert cache.cache.layers[1].get_seq_length() == 5 * TOKENS
    mask[0, 6, 0, 3] = 1
    with pytest.raises(ValueError, match="cross_attention_mask"):
        cross_context(None, mask[:, 6:], TOKENS, cached=cache.tile_mask)


def test_keys_stay_where_they_might_be_seen():
    _, states, mask = example()
    filled = torch.zeros(2, 1, 4)
    filled[..., 0] = 1
    for options, kept in (
        ({"aspect_ratio_mask": filled}, 2),  # the mask shows a tile more
        (
            {"aspect_ratio_mask": filled, "reference": "hf"},
            4,
        ),  # positions that see none attend to all
        (
            {"aspect_ratio_mask": torch.zeros(2, 1, 4), "mask": torch.zeros_like(mask)},
            4,
        ),  # an image always has keys
        ({"aspect_ratio_mask": filled, "mask": None}, 4),
        ({}, 4),
    ):
        cross = cross_context(
            **{"states": states, "mask": mask, "tokens_per_tile": TOKENS} | options
        )
        assert cross.states.shape[1] == kept * TOKENS == int(cross.tile_mask.sum()) * TOKENS


def test_without_images_the_layer_does_nothing():
    ours, _ = layers()
    hidden = torch.randn(2, 3, 64)
    assert (
        cross_context(None, None, TOKENS) is None
        and cross_context(None, torch.zeros(2, 3, 1, 4), TOKENS) is None
    )
    assert ours(hidden, None, None)[0] is hidden


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "cross_attention_mask", {"mask": [1]}),
        (ValueError, "for 4 tiles, got .2, 7, 2, 4", {"mask": torch.ones(2, 7, 2, 4)}),
        (ValueError, "cross_attention_mask must be", {"mask": torch.ones(2, 7)}),
        (ValueError, "for 5 tiles", {"cached": torch.ones(1, dtype=torch.bool)}),
        (ValueError, "aspect_ratio_mask", {"aspect_ratio_mask": torch.ones(2, 1, 3)}),
        (ValueError, "reference must be", {"reference": "torchtune"}),
    ],
)
def test_other_input_is_refused(error, match, options):
    _, states, mask = example()
    with pytest.raises(error, match=match):
        cross_context(**{"states": states, "mask": mask, "tokens_per_tile": TOKENS} | options)


def test_layers_are_plain_modules():
    """LoRA and quantization replace nn.Linear leaves by name."""
    ours, _ = layers()
    linear = {
        name.rpartition(".")[2]
        for name, module in ours.named_modules()
        if type(module) is nn.Linear
    }
    assert linear == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_context_goes_to_the_layers_device():
    _, states, mask = example()
    cross = cross_context(states, mask, TOKENS).to("meta")
    assert all(segment.key_mask.is_meta for segment in cross.segments)
    assert cross.states.is_meta and cross.visible.is_meta and not cross.tile_mask.is_meta
    assert cross_context(states, None, TOKENS).to("meta").states.is_meta


def test_layers_may_be_spread_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    layer, _ = layers()
    hidden, states, mask = example()
    cross = cross_context(states, mask, TOKENS)
    with torch.no_grad():
        expected, _ = layer(hidden, cross=cross)
        accelerate.cpu_offload(layer, torch.device("cpu"))
        assert torch.equal(layer(hidden, cross=cross)[0], expected)
