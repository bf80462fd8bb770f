"""`siglip` and `modeling_siglip`: features equal to the package's and to transformers'."""

import types

import pytest
import torch
import transformers
from torch import nn

import mllama
import tiny
from dropin.toys import close
from mllama.dropin import vision

SIZES = tiny.VISION | {"hidden_size": 64, "image_size": 32, "num_attention_heads": 4}
OLDER = {
    ".embedding.": ".embeddings.",
    "layernorm1": "layer_norm1",
    "layernorm2": "layer_norm2",
    ".layernorm.": ".post_layernorm.",
}
KINDS = pytest.mark.parametrize("kind", [vision.SiglipModel, vision.SiglipVisionModel])


def config(**sizes) -> vision.SiglipVisionConfig:
    return vision.SiglipVisionConfig(**SIZES | sizes)


def model(kind=vision.SiglipModel, **sizes):
    return tiny.randomize(kind(config(**sizes))).eval()


def stock_names(weights: dict) -> dict:
    """Names of Hugging Face's files, of those in `siglip`."""
    for older, name in OLDER.items():
        weights = {key.replace(older, name): value for key, value in weights.items()}
    return weights


def test_sizes():
    base = vision.SiglipVisionConfig(projection_dim=128)
    assert (base.hidden_size, base.intermediate_size, base.image_size) == (768, 3072, 224)
    assert base.projection_dim == 128 and base.num_image_tokens is None
    for name, value in {"num_attention_heads": 5, "patch_size": 33}.items():
        with pytest.raises(ValueError, match=name):
            config(**{name: value})


@KINDS
@pytest.mark.parametrize(
    "sizes",
    [{}, {"image_size": 27, "num_channels": 1}, {"hidden_size": 60, "num_attention_heads": 3}],
)
def test_features_equal_the_packages_and_transformers(kind, sizes):
    ours, stock = model(kind, **sizes), transformers.SiglipVisionConfig(**SIZES | sizes)
    stock.vision_use_head = False
    weights = stock_names(ours.state_dict())
    weights = {name.removeprefix("vision_model."): value for name, value in weights.items()}
    theirs = transformers.SiglipVisionModel(stock).eval()
    packages = mllama.SiglipModel(stock).eval()
    theirs.load_state_dict(weights)
    packages.vision_tower.load_state_dict(weights)
    pixels = torch.randn(2, stock.num_channels, stock.image_size, stock.image_size)
    with torch.no_grad():
        features = ours(pixels)
        assert type(features) is torch.Tensor
        assert features.shape == (2, (stock.image_size // 8) ** 2, stock.hidden_size)
        close(features, packages(pixels).last_hidden_state)
        close(features, theirs(pixels).last_hidden_state, 1e-4)


def test_names_of_the_weights():
    names = list(model(num_hidden_layers=1).state_dict())
    layer = "vision_model.encoder.layers.0"
    parts = [
        "vision_model.embedding.patch_embedding",
        "vision_model.embedding.position_embedding",
        f"{layer}.layernorm1",
        *(f"{layer}.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
        f"{layer}.layernorm2",
        *(f"{layer}.mlp.{part}" for part in ("fc1", "fc2")),
        "vision_model.layernorm",
    ]
    assert list(dict.fromkeys(name.rpartition(".")[0] for name in names)) == parts
    model(vision.SiglipVisionModel).load_state_dict(stock_names(model().state_dict()))


def test_scores_are_divided_by_the_root_of_the_head_size():
    attention, x = tiny.randomize(vision.SiglipAttention(config())), torch.randn(2, 7, 64)
    output, weights = attention(x)
    q, k, v = (
        projection(x).view(2, 7, 4, 16).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    expected = (q @ k.mT / 16**0.5).softmax(-1)
    close(weights, expected)
    close(output, attention.out_proj((expected @ v).transpose(1, 2).flatten(2)), 1e-4)
    assert (attention.scale, attention.num_heads, attention.head_dim) == (0.25, 4, 16)


def test_parts_are_called_one_after_the_other():
    ours, pixels = model(num_hidden_layers=3), torch.randn(2, 3, 32, 32)
    inside = ours.vision_model
    states = inside.embedding(pixels)
    assert states.shape == (2, 16, 64) and inside.embedding.num_patches == 16
    for layer in inside.encoder.layers:
        states = states + layer.self_attn(layer.layernorm1(states))[0]
        states = states + layer.mlp(layer.layernorm2(states))
    close(ours(pixels), inside.layernorm(states))
    close(inside.encoder(inputs_embeds=states), inside.encoder(states), 0)
    mlp = layer.mlp
    close(mlp(states), mlp.fc2(nn.functional.gelu(mlp.fc1(states), approximate="tanh")))


def test_a_config_of_the_scripts_own_will_do():
    defaults = {name: getattr(config(), name) for name in ("layer_norm_eps", "attention_dropout")}
    own = types.SimpleNamespace(**SIZES, **defaults, num_channels=3)
    ours, theirs = vision.SiglipModel(own).eval(), model()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    close(ours(pixels), theirs(pixels), 0)


def test_training():
    ours, pixels = model().train(), torch.randn(1, 3, 32, 32)
    ours(pixels).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert all(grad.abs().sum() > 0 for name, grad in grads.items() if "k_proj.bias" not in name)
    dropping = model(attention_dropout=0.5)
    close(dropping(pixels), model()(pixels), 0)
    assert not torch.allclose(dropping.train()(pixels), dropping.eval()(pixels))


@KINDS
def test_pixels(kind):
    ours = model(kind)
    assert ours.half()(torch.randn(1, 3, 32, 32)).dtype == torch.float16
    with pytest.raises(ValueError, match="pixel_values"):
        ours(torch.randn(1, 3, 24, 24))
    with pytest.raises(TypeError, match="pixel_values"):
        ours(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
