"""Files of blocks that are written: their types, and what they hold."""

import pytest
import torch

from mllama import MllamaForConditionalGeneration

gguf = pytest.importorskip("gguf")

from checkpoints.test_gguf import own, stock  # noqa: E402
from mllama.checkpoints.gguf.blocks import choose_types, to_blocks  # noqa: E402
from mllama.hf.gguf import save_gguf  # noqa: E402

Type = gguf.GGMLQuantizationType
# Of a normal weight's size, what a type may lose.
BOUNDS = {Type.Q8_0: 0.01, Type.Q4_0: 0.1, Type.Q5_0: 0.05, Type.Q5_1: 0.05}
BOUNDS |= {Type.Q4_K: 0.08, Type.Q5_K: 0.04, Type.Q6_K: 0.02}
WIDE = {
    "vocab_size": 330,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 3,
}


def kinds_of(path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_types_of_q4_k(tmp_path, make_tokenizer):
    """llama.cpp's Q4_K_M of 3 layers: 2 * 8 // 8 is the last eighth, and (2 - 0) % 3 == 2."""
    save_gguf(own(stock(**WIDE)), make_tokenizer(), tmp_path / "model.gguf", "q4_k")
    kinds = kinds_of(tmp_path / "model.gguf")
    assert kinds["token_embd.weight"] == "Q4_K" and kinds["output.weight"] == "Q6_K"
    for layer in range(3):
        more = "Q6_K" if layer == 2 else "Q4_K"
        for name, kind in (
            ("attn_q", "Q4_K"),
            ("attn_k", "Q4_K"),
            ("attn_v", more),
            ("attn_output", "Q4_K"),
            ("ffn_gate", "Q4_K"),
            ("ffn_up", "Q4_K"),
            ("ffn_down", more),
            ("attn_norm", "F32"),
        ):
            assert kinds[f"blk.{layer}.{name}.weight"] == kind, name
    header = gguf.GGUFReader(tmp_path / "model.gguf").fields["general.file_type"]
    assert header.contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M


def test_layers_with_more_bits():
    """Of 28 layers, as llama.cpp's formula gives them."""
    names = [f"blk.{layer}.ffn_down.weight" for layer in range(28)]
    kinds = choose_types({name: torch.empty(1, 256).zero_() for name in names}, "q4_k", 28)
    more = [layer for layer, kind in enumerate(kinds.values()) if kind == Type.Q6_K]
    assert more == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]


@pytest.mark.parametrize(("width", "rest"), [(512, "Q5_K"), (288, "Q5_1")])
def test_values_of_70b(width, rest):
    names = [f"blk.{layer}.attn_v.weight" for layer in range(80)]
    kinds = choose_types({name: torch.zeros(8, width) for name in names}, "q4_k", 80).values()
    assert [kind.name for kind in kinds].count(
        rest
    ) == 40  # of 60 in the middle, every third is Q6_K
    square = choose_types({name: torch.zeros(256, 256) for name in names}, "q4_k", 80)
    assert {kind.name for kind in square.values()} == {"Q4_K", "Q6_K"}


@pytest.mark.parametrize(
    ("dtype", "width", "body", "head"),
    [
        ("q8_0", 256, "Q8_0", "Q8_0"),
        ("q8_0", 80, "F16", "F16"),
        ("q4_0", 256, "Q4_0", "Q6_K"),
        ("q4_0", 96, "Q4_0", "Q8_0"),
        ("q4_0", 80, "F16", "F16"),
        ("q4_k", 256, "Q4_K", "Q6_K"),
        ("q4_k", 96, "Q5_0", "Q8_0"),
        ("q4_k", 80, "F16", "F16"),
    ],
)
def test_types_by_width(dtype, width, body, head):
    tensors = {name: torch.zeros(2, width) for name in ("token_embd.weight", "blk.0.attn_q.weight")}
    kinds = [kind.name for kind in choose_types(tensors, dtype, 9).values()]
    assert kinds == [head, body]  # without an output.weight, the embeddings are the head
    tensors["output.weight"] = torch.zeros(2, width)
    kinds = [kind.name for kind in choose_types(tensors, dtype, 9).values()]
    assert kinds == [body, body, head]


@pytest.mark.parametrize(("dtype", "bound"), [("q8_0", 0.01), ("q4_0", 0.12), ("q4_k", 0.09)])
@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_what_is_written_comes_back(tmp_path, make_tokenizer, architecture, dtype, bound):
    ours, path = own(stock(architecture, **WIDE)), tmp_path / "model.gguf"
    save_gguf(ours, make_tokenizer(), path, dtype)
    again = MllamaForConditionalGeneration.from_pretrained(path).state_dict()
    for name, value in ours.state_dict().items():
        if value.dim() == 1:
            assert torch.allclose(again[name], value, atol=1e-6)
        else:
            assert (again[name] - value).norm() <= bound * value.norm(), name


@pytest.mark.parametrize("kind", list(BOUNDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_hold_the_tensor(kind, dtype):
    """Against the gguf library: what llama.cpp would read."""
    w = (torch.randn(5, 512) / 20).to(dtype)
    w[3] = 0
    dense = torch.from_numpy(gguf.dequantize(to_blocks("x", w, kind), kind))
    assert (dense - w.float()).norm() <= BOUNDS[kind] * w.float().norm()
    assert not dense[3].any()


def test_weights_that_are_too_large_or_nan():
    for kind, size in ((Type.Q4_0, 1e7), (Type.Q4_K, 1e9), (Type.Q6_K, 1e12)):
        with pytest.raises(ValueError, match="blk.0"):
            to_blocks("blk.0", torch.randn(2, 256) * size, kind)
    for dtype, size in (("f16", 1e5), ("q8_0", 1e7), ("f16", torch.nan), ("q8_0", torch.nan)):
        with pytest.raises(ValueError, match="blk.0"):
            choose_types({"blk.0": torch.full((2, 256), size)}, dtype, 1)
