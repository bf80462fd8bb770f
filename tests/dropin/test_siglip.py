"""`siglip` and `modeling_siglip`: names, signatures, shapes, and features equal to the package's
and to transformers'.
"""

import inspect
import types

import pytest
import torch
import transformers

import mllama
import twins
from mllama.dropin import modeling_siglip, siglip
from mllama.hf.configs import MllamaConfig

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "num_image_tokens": None,
}
OLDER = {
    ".embedding.": ".embeddings.",
    "layernorm1": "layer_norm1",
    "layernorm2": "layer_norm2",
    ".layernorm.": ".post_layernorm.",
}
MODULES = [siglip, modeling_siglip]


def model(module, **sizes):
    config = module.SiglipVisionConfig(**SIZES | sizes)
    return twins.randomise(
        (module.SiglipModel if module is siglip else module.SiglipVisionModel)(config)
    ).eval()


def stock_names(weights: dict) -> dict:
    """Hugging Face's names, as files have them, of the names in `siglip`."""
    for older, name in OLDER.items():
        weights = {key.replace(older, name): value for key, value in weights.items()}
    return weights


# ---- config
# ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_config_has_the_older_signature(module):
    parameters = inspect.signature(module.SiglipVisionConfig).parameters
    assert {
        name: parameter.default for name, parameter in parameters.items() if name != "kwargs"
    } == DEFAULTS
    assert (
        list(parameters)[:10] == list(DEFAULTS)
        and parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    )
    config = module.SiglipVisionConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_config_by_place_and_with_further_names():
    config = siglip.SiglipVisionConfig(64, 96, 2, 4, 3, 32, 8, 1e-5, 0.1, 16, projection_dim=128)
    values = (64, 96, 2, 4, 3, 32, 8, 1e-5, 0.1, 16)
    assert (
        tuple(getattr(config, name) for name in DEFAULTS) == values and config.projection_dim == 128
    )
    config.projection_dim = 256
    assert config.projection_dim == 256


def test_a_config_of_the_scripts_own_will_do():
    own = types.SimpleNamespace(**DEFAULTS | SIZES)
    ours = siglip.SiglipModel(own).eval()
    theirs = siglip.SiglipModel(siglip.SiglipVisionConfig(**SIZES)).eval()
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(ours(pixels), theirs(pixels), rtol=0, atol=0)


def test_config_goes_into_the_packages():
    vision = siglip.SiglipVisionConfig(**SIZES)
    assert (
        MllamaConfig(
            vision, {"vocab_size": 99, "hidden_size": 64, "num_attention_heads": 4}
        ).text_config.num_image_tokens
        == 16
    )


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"hidden_size": 600, "num_attention_heads": 2}, "head_dim .* got 300"),
        ({"patch_size": 33}, "patch_size 33 is larger than image_size 32"),
        ({"patch_size": 0}, "patch_size must be an integer of at least 1, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ({"attention_dropout": 1.0}, "attention_dropout must be a number from 0 to below 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, named):
    with pytest.raises(ValueError, match=named):
        siglip.SiglipVisionConfig(**SIZES | sizes)


# ---- names
# -------------------------------------------------------------------------------------------------------------------------------


def test_modules_of_those_names_are_these():
    import Model.siglip as in_folder
    import modeling_siglip as loose_c
    import siglip as loose

    for name in siglip.__all__:
        assert getattr(loose, name) is getattr(in_folder, name) is getattr(siglip, name)
    for name in modeling_siglip.__all__:
        assert getattr(loose_c, name) is getattr(modeling_siglip, name)


def test_weights_have_the_older_names():
    names = list(model(siglip, num_hidden_layers=1).state_dict())
    layer = "vision_model.encoder.layers.0"
    both = ("weight", "bias")
    assert names == [
        *(f"vision_model.embedding.patch_embedding.{kind}" for kind in both),
        "vision_model.embedding.position_embedding.weight",
        *(f"{layer}.layernorm1.{kind}" for kind in both),
        *(
            f"{layer}.self_attn.{part}.{kind}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj")
            for kind in both
        ),
        *(f"{layer}.layernorm2.{kind}" for kind in both),
        *(f"{layer}.mlp.{part}.{kind}" for part in ("fc1", "fc2") for kind in both),
        *(f"vision_model.layernorm.{kind}" for kind in both),
    ]


def test_weights_have_hugging_faces_names_in_modeling_siglip():
    weights = model(siglip).state_dict()
    model(modeling_siglip).load_state_dict(stock_names(weights))


def test_parts_are_read_as_scripts_read_them():
    config = siglip.SiglipVisionConfig(**SIZES)
    ours = siglip.SiglipModel(config)
    tower = ours.vision_model
    embedding, attention = tower.embedding, tower.encoder.layers[1].self_attn
    assert isinstance(tower, siglip.SiglipVisionTransformer) and isinstance(
        embedding, siglip.SiglipVisionEmbedding
    )
    assert isinstance(tower.encoder, siglip.SiglipEncoder) and isinstance(
        tower.encoder.layers[0], siglip.SiglipVisionEncoder
    )
    assert isinstance(tower.encoder.layers[0].mlp, siglip.SiglipMLP) and isinstance(
        attention, siglip.SiglipAttention
    )
    for part in (ours, tower, embedding, attention, tower.encoder, tower.encoder.layers[0].mlp):
        assert part.config is config
    assert (embedding.embed_dim, embedding.image_size, embedding.patch_size) == (64, 32, 8)
    assert (
        embedding.num_patches == embedding.num_positions == 16
        and embedding.position_ids.tolist() == [list(range(16))]
    )
    assert (
        attention.embed_dim,
        attention.num_heads,
        attention.head_dim,
        attention.scale,
        attention.dropout,
    ) == (64, 4, 16, 0.25, 0.0)


# ---- values
# ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_attention_heads": 8},
        {"image_size": 27, "num_channels": 1},
        {"hidden_size": 60, "num_attention_heads": 3},
    ],
)
def test_features_equal_the_packages_and_transformers(module, sizes):
    ours = model(module, **sizes)
    config = transformers.SiglipVisionConfig(**SIZES | sizes, vision_use_head=False)
    weights = {
        name.removeprefix("vision_model."): value
        for name, value in stock_names(ours.state_dict()).items()
    }
    theirs, packages = (
        transformers.SiglipVisionModel(config).eval(),
        mllama.SiglipModel(config).eval(),
    )
    theirs.load_state_dict(weights)
    packages.vision_tower.load_state_dict(weights)
    pixels = torch.randn(2, config.num_channels, config.image_size, config.image_size)
    with torch.no_grad():
        features = ours(pixels)
        assert type(features) is torch.Tensor and features.shape == (
            2,
            (config.image_size // 8) ** 2,
            config.hidden_size,
        )
        torch.testing.assert_close(features, packages(pixels).last_hidden_state, rtol=0, atol=0)
        torch.testing.assert_close(features, theirs(pixels).last_hidden_state, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.vision_model(pixel_values=pixels), features, rtol=0, atol=0)


def test_attention_returns_probabilities():
    attention = twins.randomise(siglip.SiglipAttention(siglip.SiglipVisionConfig(**SIZES)))
    x = torch.randn(2, 7, 64)
    output, weights = attention(x)
    assert output.shape == x.shape and weights.shape == (2, 4, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
    q, k, v = (
        projection(x).view(2, 7, 4, 16).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    expected = (q @ k.transpose(2, 3) / 4).softmax(-1)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        output, attention.out_proj((expected @ v).transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-4
    )
    assert attention.bfloat16()(x.bfloat16())[1].dtype == torch.bfloat16


def test_parts_alone():
    config = siglip.SiglipVisionConfig(**SIZES)
    pixels = torch.randn(2, 3, 32, 32)
    embedded = siglip.SiglipVisionEmbeddings(config)(pixels)
    assert embedded.shape == (2, 16, 64)
    for part in (siglip.SiglipMLP, siglip.SiglipVisionEncoder, siglip.SiglipEncoder):
        states = part(config)(embedded)
        assert type(states) is torch.Tensor and states.shape == embedded.shape
    assert siglip.SiglipEncoder(config)(inputs_embeds=embedded).shape == embedded.shape
    mlp = siglip.SiglipMLP(config)
    torch.testing.assert_close(
        mlp(embedded), mlp.fc2(torch.nn.functional.gelu(mlp.fc1(embedded), approximate="tanh"))
    )


def test_gradients_reach_every_weight():
    ours = model(siglip).train()
    ours(torch.randn(1, 3, 32, 32)).square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for name, parameter in ours.named_parameters()
        if "k_proj.bias" not in name
    )


def test_dropout_is_training_alone():
    ours, pixels = model(siglip, attention_dropout=0.5), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), model(siglip)(pixels), rtol=0, atol=0)
        assert not torch.allclose(ours.train()(pixels), ours.eval()(pixels))


def test_half_precision_takes_float32_pixels():
    assert model(siglip).half()(torch.randn(1, 3, 32, 32)).dtype == torch.float16


@pytest.mark.parametrize(
    "part", [siglip.SiglipModel, siglip.SiglipVisionTransformer, siglip.SiglipVisionEmbeddings]
)
def test_other_pixels_are_refused(part):
    part = part(siglip.SiglipVisionConfig(**SIZES))
    with pytest.raises(
        ValueError, match=r"pixel_values must be \[pictures, 3, 32, 32\], got \[1, 3, 24, 24\]"
    ):
        part(torch.randn(1, 3, 24, 24))
    with pytest.raises(
        TypeError, match="pixel_values must be a floating torch.Tensor, got torch.uint8"
    ):
        part(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
