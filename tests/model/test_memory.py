"""What memory a model needs: against figures worked out by hand, and against what tiny models
really hold.
"""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, MllamaConfig, SiglipVisionConfig

import tiny
from helpers import needs_kernels
from mllama import MllamaForConditionalGeneration, SiglipModel
from mllama.model.memory import Work, count_parameters, image_tokens, memory_needed

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


class Peak(TorchDispatchMode):
    """Measures in `most` the bytes of all tensors made inside that are alive at once."""

    def __init__(self):
        super().__init__()
        self.most = self.now = 0
        self.alive, self.given = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage()._cdata not in self.alive
            ):
                self.given.add(tensor.untyped_storage()._cdata)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if (
                isinstance(tensor, torch.Tensor)
                and (memory := tensor.untyped_storage())._cdata not in self.alive | self.given
            ):
                self.alive.add(memory._cdata)
                self.now += memory.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(memory, self._gone, memory._cdata, memory.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def test_llama_1b_by_hand():
    model = on_meta(MllamaForConditionalGeneration, LlamaConfig(**LLAMA_1B))
    assert count_parameters(model) == {
        "embeddings": 128256 * 2048,
        "decoder": 973_146_112,
    }  # 1 235 814 400, as published
    needed = memory_needed(model, Work(context=8192, batch=2, tiles=0, dtype=torch.bfloat16))
    assert needed == {
        "weights": 1_235_814_400 * 2,
        "key-value cache": 16
        * 2
        * 8
        * 64
        * 8192
        * 2
        * 2,  # layers, K and V, heads, width, tokens, rows, bytes: 512 MiB
        "decoder activations": 8192 * 2 * (4 * 2048 + 3 * 8192) * 2,
        "logits": 2 * 128256 * (2 + 4),
    }


def test_an_encoder_alone():
    model = on_meta(SiglipModel, SiglipVisionConfig())
    assert count_parameters(model) == {"vision encoder": 92_884_224}
    work = Work(context=0, batch=3, tiles=1, dtype=torch.float32)
    assert memory_needed(model, work) == {
        "weights": 92_884_224 * 4,
        "vision activations": 3 * 196 * (4 * 768 + 2 * 3072) * 4,
    }


@pytest.fixture(scope="module")
def model():
    vision = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "image_size": 128,
        "num_hidden_layers": 3,
    }
    text = {"num_hidden_layers": 3, "intermediate_size": 256, "max_position_embeddings": 600}
    return tiny.model(vision=vision, text=text)


@needs_kernels  # the references hold scores, which the estimate leaves out
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_what_a_model_holds(model, dtype):
    model = model.to(dtype)
    needed = memory_needed(model, Work(context=300, batch=2, tiles=1, dtype=dtype))
    pixels, ids = torch.randn(2, 3, 128, 128), torch.randint(1, 90, (2, 300))
    assert image_tokens(model.spec, 1) == model.get_image_features(pixels).shape[1]
    assert needed["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    with torch.inference_mode():
        output = model(ids, logits_to_keep=1)
        assert needed["key-value cache"] == sum(
            layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers
        )
        assert needed["logits"] == output.logits.nbytes + output.logits.float().numel() * 4
        with Peak() as vision:
            model.get_image_features(pixels)
        with Peak() as decoder:
            model(ids, use_cache=False, logits_to_keep=1)
    assert needed["vision activations"] == pytest.approx(vision.most, rel=0.25)
    assert needed["decoder activations"] == pytest.approx(decoder.most, rel=0.25)


@pytest.fixture(scope="module")
def tiled():
    vision = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "attention_heads": 2,
        "num_hidden_layers": 6,
        "num_global_layers": 2,
        "intermediate_layers_indices": [0, 1, 2, 3, 4],
        "vision_output_dim": 384,
        "image_size": 112,
        "patch_size": 14,
    }
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = tiny.TEXT | ends | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    return tiny.randomize(
        MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))
    ).eval()


@needs_kernels
@pytest.mark.parametrize(("arrangement", "tiles"), [(1, 1), (2, 2), (4, 4)])
def test_against_what_a_tiled_model_holds(tiled, arrangement, tiles):
    needed = memory_needed(tiled, Work(context=30, batch=2, tiles=tiles, dtype=torch.float32))
    filled = (torch.arange(4) < tiles).long().expand(2, 1, 4)
    images = {
        "pixel_values": torch.randn(2, 1, 4, 3, 112, 112) * filled[..., None, None, None],
        "aspect_ratio_ids": torch.full((2, 1), arrangement),
        "aspect_ratio_mask": filled,
    }
    with torch.inference_mode():
        output = tiled(
            torch.randint(1, 90, (2, 30)),
            **images,
            cross_attention_mask=filled[:, None].expand(2, 30, 1, 4),
        )
        with Peak() as vision:
            tiled.get_image_features(**images)
    sizes = [layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers]
    assert (
        needed["cross-attention keys and values"] == sizes[1] + sizes[3]
        and needed["key-value cache"] == sizes[0] + sizes[2]
    )
    assert needed["vision activations"] == pytest.approx(vision.most, rel=0.25)


@pytest.mark.parametrize(
    ("options", "features", "new"),
    [
        ({"fusion": "prepend", "num_image_tokens": 3}, 3, {}),
        (
            {"fusion": "prepend", "num_image_tokens": 3, "image_pooling": "learned"},
            3,
            {"projector": 3 * 4 + 3},
        ),
        (
            {
                "fusion": "cross_attention",
                "cross_attention_every": 2,
                "text": {"num_hidden_layers": 5},
            },
            4,
            {"cross layers": 2 * 30882},
        ),
    ],
    ids=["average", "learned", "cross_attention"],
)
def test_other_fusions(options, features, new):
    model, plain = (
        tiny.model(**options | {"image_token_index": None}),
        tiny.model(text=options.get("text")),
    )
    expected = count_parameters(plain)
    assert count_parameters(model) == expected | {
        part: count + expected.get(part, 0) for part, count in new.items()
    }
    needed = memory_needed(model, Work(context=20, batch=2, tiles=2, dtype=torch.float32))
    words = 20 - 2 * features * (options["fusion"] == "prepend")
    with torch.inference_mode():
        cache = model(torch.randint(1, 90, (2, words)), tiny.images(4)).past_key_values
    sizes = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    crossed = model.spec.text.cross_attention_layers or []
    assert image_tokens(model.spec, 1) == features
    assert needed.get("cross-attention keys and values", 0) == sum(
        sizes[index] for index in crossed
    )
    assert needed["key-value cache"] == sum(sizes) - sum(sizes[index] for index in crossed)
    assert (
        needed["vision activations"]
        == memory_needed(plain, Work(20, 2, 2, torch.float32))["vision activations"]
    )


def test_llama_11b_vision_by_hand():
    config = MllamaConfig(vision_config={"image_size": 560}, text_config={})
    model = on_meta(MllamaForConditionalGeneration, config)
    parameters = count_parameters(model)
    assert sum(parameters.values()) == 10_670_220_835  # as published
    assert parameters["cross layers"] == 8 * (
        2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096 + 2 * 128 + 2
    )
    needed = memory_needed(model, Work(context=4096, batch=1, tiles=4, dtype=torch.bfloat16))
    assert (
        needed["cross-attention keys and values"] == 8 * 2 * 8 * 128 * 6404 * 2
    )  # layers, K and V, heads, width, 4 x 1601 keys, bytes
    assert needed["key-value cache"] == 32 * 2 * 8 * 128 * 4096 * 2
