"""Faults that loose files of these names had: each is absent from `siglip` and from the
`processing_` modules.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ByT5Tokenizer

import twins
from mllama.dropin.processing_mllama import MllamaImageProcessor
from mllama.dropin.processing_paligemma import PaliGemmaProcessor
from mllama.dropin.processing_siglip import paligemmaProcessor
from mllama.dropin.siglip import SiglipAttention, SiglipMLP, SiglipModel, SiglipVisionConfig

N, S = 4, 16
PROCESSORS = pytest.mark.parametrize(
    "kind", [MllamaImageProcessor, paligemmaProcessor, PaliGemmaProcessor]
)


def config(**sizes):
    return SiglipVisionConfig(
        **{"hidden_size": 64, "num_attention_heads": 4, "image_size": 32, "patch_size": 8} | sizes
    )


def tower(**sizes):
    return twins.randomise(
        SiglipModel(config(intermediate_size=96, num_hidden_layers=3, **sizes))
    ).eval()


def picture(seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    )


# ---- siglip
# ------------------------------------------------------------------------------------------------------------------------------


def test_projections_are_called_not_viewed():
    attention, called, x = SiglipAttention(config()), [], torch.randn(2, 5, 64)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        getattr(attention, name).register_forward_hook(
            lambda module, given, output, name=name: called.append((name, given[0].shape))
        )
    attention(x)
    assert called == [(name, x.shape) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]


def test_scores_are_divided_by_the_root_of_the_head_size():
    attention, x = twins.randomise(SiglipAttention(config())), torch.randn(1, 6, 64)
    q, k = (
        projection(x).view(1, 6, 4, 16).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    assert attention.scale == 16**-0.5
    torch.testing.assert_close(attention(x)[1], (q @ k.transpose(2, 3) / 16**0.5).softmax(-1))


def test_intermediate_size_is_four_times_the_width():
    assert SiglipVisionConfig().intermediate_size == 3072
    assert SiglipMLP(SiglipVisionConfig()).fc1.weight.shape == (3072, 768)


def test_the_embedding_is_called_on_the_pixels():
    model, pixels = tower(), torch.randn(1, 3, 32, 32)
    other = pixels.clone()
    other[..., :8, :8] += 1
    assert not torch.allclose(model(pixels), model(other))


def test_the_encoder_is_all_layers_on_the_embeddings_and_the_final_norm_comes_last():
    model, pixels = tower(), torch.randn(2, 3, 32, 32)
    inside = model.vision_model
    states = inside.embedding(pixels)
    assert len(inside.encoder.layers) == 3
    for layer in inside.encoder.layers:
        attended, _ = layer.self_attn(layer.layernorm1(states))
        states = states + attended
        states = states + layer.mlp(layer.layernorm2(states))
    torch.testing.assert_close(model(pixels), inside.layernorm(states), rtol=1e-4, atol=1e-4)


# ---- processing
# --------------------------------------------------------------------------------------------------------------------------


@PROCESSORS
def test_the_image_token_is_one_special_token_known_to_class_and_object(kind, make_tokenizer):
    processor = kind(make_tokenizer(), N, S)
    tokenizer = processor.tokenizer
    assert kind.IMAGE_TOKEN == processor.IMAGE_TOKEN == "<image>"
    assert (
        "<image>" in tokenizer.extra_special_tokens
        and processor.image_token_id in tokenizer.all_special_ids
    )
    ids = processor(["hello"], [picture()])["input_ids"][0]
    assert (
        ids[:N].tolist() == [processor.image_token_id] * N
        and tokenizer.decode(ids, skip_special_tokens=True) == "hello\n"
    )


@PROCESSORS
def test_tokenizers_without_bos_or_habits(kind):
    tokenizer = ByT5Tokenizer()
    assert (
        tokenizer.bos_token is None
        and not hasattr(tokenizer, "add_bos_token")
        and not hasattr(tokenizer, "add_eos_token")
    )
    processor = kind(tokenizer, N, S)
    assert (
        tokenizer.decode(processor(["hello"], [picture()])["input_ids"][0])
        == "<image>" * N + "hello\n"
    )
    assert not hasattr(tokenizer, "add_bos_token")


@PROCESSORS
def test_location_tokens_are_not_overwritten_by_segmentation_tokens(kind, make_tokenizer):
    tokenizer = make_tokenizer()
    before = len(tokenizer)
    kind(tokenizer, N, S)
    tokens = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]
    ids = [tokenizer.encode(token, add_special_tokens=False) for token in tokens]
    assert (
        all(len(row) == 1 for row in ids)
        and len({row[0] for row in ids}) == 1152
        and len(tokenizer) == before + 1153
    )


@PROCESSORS
def test_several_prompts_and_pictures_in_one_call(kind, make_tokenizer):
    processor = kind(make_tokenizer(), N, S)
    batch = processor(
        ["one", "two", "number three"], [picture(0), picture(1), picture(2)], padding="longest"
    )
    assert batch["pixel_values"].shape == (3, 3, S, S) and batch["input_ids"].shape[0] == 3
    for number in range(3):
        assert torch.equal(
            batch["pixel_values"][number], processor(["x"], [picture(number)])["pixel_values"][0]
        )
    assert processor(["which?"], [[picture(0), picture(1)]])["pixel_values"].shape == (2, 3, S, S)


@PROCESSORS
def test_pixels_are_a_tensor_under_every_key(kind, make_tokenizer):
    batch = kind(make_tokenizer(), N, S)(["hello"], [picture()])
    for key in ("pixel Value", "pixel_value", "pixel_values"):
        assert isinstance(batch[key], torch.Tensor) and batch[key].dtype == torch.float32
