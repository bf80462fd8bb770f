"""GGUF files against stock transformers, against llama.cpp's layout spelled out here, and against
files that lie.
"""

import re
import struct
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import tiny
from mllama import MllamaForConditionalGeneration
from tiny.sizes import LLAMA32
from tiny.stock import make as make_stock

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

from mllama.checkpoints.gguf.header import GgufHeader  # noqa: E402
from mllama.checkpoints.gguf.reader import GgufSource, open_gguf  # noqa: E402
from mllama.checkpoints.gguf.tokenizer import _PRE as PRE  # noqa: E402
from mllama.checkpoints.gguf.windows import window_arguments  # noqa: E402
from mllama.hf.gguf import save_gguf  # noqa: E402
from mllama.hf.processors.tokenizers import load_gguf_tokenizer as load_tokenizer  # noqa: E402

Type = gguf.GGMLQuantizationType
SIZES = tiny.SIZES | {"head_dim": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
LLAMA3 = LLAMA32 | {"rope_theta": 500000.0}
# llama.cpp's names, from its converter.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
WINDOWED = {
    "sliding_window": 6,
    "query_pre_attn_scalar": 16,
    "num_hidden_layers": 3,
    "final_logit_softcapping": 2.0,
}


def stock(architecture: str = "llama", **options):
    """A tiny random model of stock transformers, by the architecture's name in GGUF. What a file
    need not say is as in the released models.
    """
    released = {"attn_logit_softcapping": 50.0} if architecture == "gemma2" else {}
    released |= {"layer_types": None} if architecture == "gemma3" else {}
    family = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    return make_stock(family, **SIZES | {"pad_token_id": None} | released | options)


def theirs(name: str, four_norms: bool = False) -> str:
    """llama.cpp's name of a tensor of stock transformers."""
    names = NAMES | (FOUR_NORMS if four_norms else {})
    if not name.startswith("model.layers."):
        stem, kind = name.rsplit(".", 1)
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, *inner, kind = name.split(".")
    return f"blk.{layer}.{names['.'.join(inner)]}.{kind}"


def write(
    path: Path,
    model,
    kind: Type = Type.F32,
    metadata=lambda writer: None,
    extra: dict | None = None,
    **changed,
) -> Path:
    """A file as llama.cpp's converter writes it: permuted q and k for llama, norms with 1 added for
    gemma.
    """
    config = model.config
    architecture = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
    }
    for name, value in sizes.items():
        if changed.get(name, value) is not None:
            writer.add_uint32(f"{architecture}.{name}", changed.get(name, value))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    metadata(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if "gemma" in architecture and "norm" in name:
            array = array + 1
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = (
                array.reshape(heads, 2, config.head_dim // 2, *array.shape[1:])
                .swapaxes(1, 2)
                .reshape(array.shape)
            )
        matrix = kind if array.ndim > 1 else Type.F32
        named = theirs(name, four_norms=architecture in ("gemma2", "gemma3"))
        writer.add_tensor(named, gguf.quantize(array, matrix), raw_dtype=matrix)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model) -> torch.Tensor:
    ids = torch.randint(0, 99, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def factors(parameters: dict, head_dim: int = 16) -> np.ndarray:
    """Llama 3's, by transformers' own function."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**SIZES | {"rope_parameters": parameters})
    plain = 1 / parameters["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    return (plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()).astype(np.float32)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
        (
            "llama",
            {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        ),
        ("gemma", {"num_key_value_heads": 1, "head_dim": 32}),
        ("gemma2", WINDOWED),
        ("gemma3", WINDOWED),
    ],
)
def test_logits_are_the_ones_of_stock_transformers(tmp_path, architecture, options):
    model = stock(architecture, **options)
    ours = MllamaForConditionalGeneration.from_pretrained(write(tmp_path / "model.gguf", model))
    assert ours.dtype == torch.float32
    tiny.close(logits(ours), logits(model))
    assert ours.config.model_type == model.config.model_type and ours.config.rms_norm_eps == 1e-5


def test_what_a_gemma_2_and_3_say_of_their_layers(tmp_path):
    def softcap_and_pattern(writer):
        writer.add_attn_logit_softcapping(1.5)
        writer.add_sliding_window_pattern(3)

    model = stock("gemma2", **WINDOWED, attn_logit_softcapping=1.5)
    model.config.layer_types[:] = ["sliding_attention"] * 2 + ["full_attention"]
    path = write(tmp_path / "gemma2.gguf", model, metadata=softcap_and_pattern)
    ours = MllamaForConditionalGeneration.from_pretrained(path)
    assert ours.config.layer_types == model.config.layer_types
    assert ours.config.attn_logit_softcapping == 1.5
    tiny.close(logits(ours), logits(model))

    def scaled(writer):
        writer.add_rope_freq_base_swa(200.0)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
        writer.add_sliding_window_pattern(2)

    rope = {"rope_type": "linear", "factor": 8.0}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    options = WINDOWED | {"rope_local_base_freq": 200.0, "rope_scaling": rope}
    model = stock("gemma3", **options, layer_types=kinds)
    path = write(tmp_path / "gemma3.gguf", model, metadata=scaled)
    ours = MllamaForConditionalGeneration.from_pretrained(path)
    assert ours.config.layer_types == kinds
    tiny.close(logits(ours), logits(model))
    for sizes, scalar in (((46, 32, 2), 16), ((45, 32, 2), 8)):  # 27B's follows from its width
        layers, hidden, heads = sizes
        arguments = {"num_hidden_layers": layers, "hidden_size": hidden, "head_dim": 8}
        found = window_arguments(
            GgufHeader(path), "gemma2", arguments | {"num_attention_heads": heads}, {}
        )
        assert found["query_pre_attn_scalar"] == scalar and found["sliding_window"] == 4096
        assert found["attn_logit_softcapping"] == 50.0 and len(found["layer_types"]) == layers


def test_a_folder_whose_only_model_is_one_gguf_file(tmp_path):
    model = stock()
    write(tmp_path / "model.gguf", model)
    (tmp_path / "README.md").write_text("about it")
    tiny.close(logits(MllamaForConditionalGeneration.from_pretrained(tmp_path)), logits(model))
    write(tmp_path / "other.gguf", model)
    with pytest.raises(ValueError, match="model.gguf, other.gguf"):
        MllamaForConditionalGeneration.from_pretrained(tmp_path)


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path):
    model = stock(rope_parameters=LLAMA3, max_position_embeddings=32768)
    path = write(tmp_path / "model.gguf", model, extra={"rope_freqs.weight": factors(LLAMA3)})
    ours = MllamaForConditionalGeneration.from_pretrained(path)
    assert ours.config.rope_parameters == LLAMA3
    tiny.close(logits(ours), logits(model))
    path = write(
        tmp_path / "none.gguf", stock(), extra={"rope_freqs.weight": np.ones(8, np.float32)}
    )
    assert open_gguf(path).spec.text.layers[0].rope.rope_type == "default"
    for wrong, said in (
        (np.linspace(1, 9, 8), "no scaling of Llama 3 with low_freq_factor 1.0"),
        (np.ones(7), "must have 8 factors"),
    ):
        with pytest.raises(ValueError, match=said):
            open_gguf(
                write(
                    tmp_path / "wrong.gguf",
                    stock(),
                    extra={"rope_freqs.weight": wrong.astype(np.float32)},
                )
            )


def test_linear_scaling(tmp_path):
    def metadata(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    model = stock(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    ours = MllamaForConditionalGeneration.from_pretrained(
        write(tmp_path / "model.gguf", model, metadata=metadata)
    )
    tiny.close(logits(ours), logits(model))


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "IQ4_XS"]
)
def test_blocks_are_dequantized(tmp_path, kind):
    """Random blocks, since gguf quantizes to some types only; K and IQ blocks are 256 wide."""
    kind, rng = Type[kind], np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = (
        gguf.quantize(rng.normal(size=(4, 256)).astype(np.float32), kind)
        if block < 256
        else rng.integers(0, 99, (4, size), np.uint8)
    )
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("x", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource(GgufHeader(tmp_path / "one.gguf"))
    header, value = source.headers()["x"], source.read("x")
    plain = {Type.F16: torch.float16, Type.BF16: torch.bfloat16}
    assert (
        (header.shape, header.dtype)
        == ((4, 256), plain.get(kind, torch.float32))
        == (tuple(value.shape), value.dtype)
    )
    assert torch.equal(
        value.float().nan_to_num(), torch.from_numpy(gguf.dequantize(stored, kind)).nan_to_num()
    )


def test_auto_is_the_files_dtype_and_float32_for_blocks(tmp_path):
    for kind, dtype in (
        (Type.F16, torch.float16),
        (Type.BF16, torch.bfloat16),
        (Type.Q8_0, torch.float32),
    ):
        assert (
            MllamaForConditionalGeneration.from_pretrained(
                write(tmp_path / "model.gguf", stock(), kind)
            ).dtype
            == dtype
        )


def test_special_ids(tmp_path):
    def metadata(writer):
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(5)

    model = MllamaForConditionalGeneration.from_pretrained(
        write(tmp_path / "model.gguf", stock(), metadata=metadata)
    )
    assert (
        model.generation_config.eos_token_id == [2, 5] and model.generation_config.bos_token_id == 1
    )
    assert model.config.pad_token_id is None
    with pytest.raises(ValueError, match="mllama.eos_token_ids"):
        open_gguf(
            write(
                tmp_path / "wrong.gguf",
                stock(),
                metadata=lambda writer: writer.add_array("mllama.eos_token_ids", [1, 99]),
            )
        )
    with pytest.raises(ValueError, match="eos_token_id is 99"):
        open_gguf(
            write(
                tmp_path / "wrong.gguf",
                stock(),
                metadata=lambda writer: writer.add_eos_token_id(99),
            )
        )


CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        ({"<|end_of_text|>": CONTROL, "<|eot_id|>": CONTROL}, [2, 3]),
        (
            {"<|end_of_text|>": CONTROL, "<|eom_id|>": CONTROL, "<|eot_id|>": NORMAL},
            [2, 3, 4],
        ),  # of files converted with wrong types
        ({"<|endoftext|>": CONTROL, "<|im_end|>": CONTROL}, [2, 3]),
        ({"<eos>": CONTROL, "<end_of_turn>": CONTROL}, [2, 3]),
        ({"<eos>": CONTROL, "</s>": NORMAL}, 2),  # a struck-out text
        ({"<eos>": CONTROL, "a": NORMAL}, 2),
    ],
)
def test_ends_of_an_answer_are_known_by_their_texts(tmp_path, tokens, ends):
    def metadata(writer):
        writer.add_token_list(["x", "y", *tokens])
        writer.add_token_types([NORMAL, NORMAL, *tokens.values()])
        writer.add_eos_token_id(2)

    model = MllamaForConditionalGeneration.from_pretrained(
        write(tmp_path / "model.gguf", stock(), metadata=metadata)
    )
    assert model.generation_config.eos_token_id == ends


@pytest.mark.parametrize("ends", [[5, 0], [0, 5], [7, 0, 5, 9], 5, None])
def test_ends_of_generation_come_back(tmp_path, make_tokenizer, ends):
    """The tokenizer's EOS is 0; a second end goes where llama.cpp looks for it."""
    ours, tokenizer = own(stock(vocab_size=320)), make_tokenizer()
    ours.generation_config.eos_token_id = ends
    save_gguf(ours, tokenizer, tmp_path / "model.gguf")
    header = GgufHeader(tmp_path / "model.gguf")
    assert header.get("tokenizer.ggml.eos_token_id", int) == tokenizer.eos_token_id == 0
    others = [end for end in ends if end != 0] if isinstance(ends, list) else [ends] if ends else []
    assert header.get("tokenizer.ggml.eot_token_id", int, -1) == (others[0] if others else -1)
    again = MllamaForConditionalGeneration.from_pretrained(tmp_path / "model.gguf")
    assert again.generation_config.eos_token_id == (0 if ends is None else ends)
    ours.generation_config.eos_token_id = [0, 320]
    with pytest.raises(ValueError, match="eos_token_id"):
        save_gguf(ours, tokenizer, tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"block_count": 0}, "llama.block_count"),
        ({"block_count": 2**31}, "block_count is 2147483648, the file holds 21 tensors in all"),
        ({"block_count": 3}, r"missing \(9\): blk.2"),
        ({"attention.head_count": None}, "has no llama.attention.head_count"),
        ({"attention.key_length": 2**30}, "head_dim"),
        ({"attention.head_count_kv": 3}, "num_attention_heads 4"),
        ({"embedding_length": 2**31 - 2}, "embedding|hidden|shape|laid out"),
        ({"feed_forward_length": 2**31}, "intermediate_size"),
        ({"feed_forward_length": 2**31 - 1}, "shape"),
    ],
)
def test_sizes_that_cannot_be(tmp_path, changed, said):
    with pytest.raises(ValueError, match=said):
        MllamaForConditionalGeneration.from_pretrained(
            write(tmp_path / "model.gguf", stock(), **changed)
        )


def test_other_models_are_refused_by_name(tmp_path):
    for architecture, add, said in (
        ("qwen2", lambda writer: None, "'qwen2' is not read"),
        ("llama", lambda writer: writer.add_expert_count(8), "has no llama.block_count"),
        ("llama", lambda writer: writer.add_uint16("split.count", 3), "is one of 3 parts"),
    ):
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
        add(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ValueError, match=said):
            open_gguf(tmp_path / "model.gguf")
    for add, said in (
        (lambda writer: writer.add_expert_count(8), "several experts are not read"),
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "'yarn' is not read",
        ),
        (
            lambda writer: writer.add_value_length(8),
            "attention.value_length is 8, attention.key_length is 16; they must be equal",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            open_gguf(write(tmp_path / "model.gguf", stock(), metadata=add))
    with pytest.raises(FileNotFoundError):
        open_gguf(tmp_path / "absent.gguf")


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def lying(tensors: int = 0, values: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


HUGE = 2**63 - 1
TENSOR = struct.Struct("<IQQIQ")  # dimensions, two sizes, type, offset
HOSTILE = {
    "empty": b"",
    "another file": b"PK\x03\x04" + bytes(64),
    "only magic": b"GGUF",
    "version 1": lying(version=1),
    "other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "tensors without end": lying(tensors=HUGE),
    "values without end": lying(values=2**64 - 1),
    "key without end": lying(values=1, rest=struct.pack("<Q", HUGE) + b"abc"),
    "text without end": lying(values=1, rest=text(b"key") + struct.pack("<IQ", 8, 2**64 - 1)),
    "array without end": lying(values=1, rest=text(b"key") + struct.pack("<IIQ", 9, 0, 2**62)),
    "array of empty texts": lying(
        values=1, rest=text(b"key") + struct.pack("<IIQ", 9, 8, 2**62) + bytes(800)
    ),
    "arrays in arrays": lying(
        values=1, rest=text(b"key") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    ),
    "unknown type of value": lying(values=1, rest=text(b"key") + struct.pack("<IQ", 13, 0)),
    "twice the same key": lying(values=2, rest=(text(b"key") + struct.pack("<II", 4, 1)) * 2),
    "key that is no text": lying(values=1, rest=text(b"\xff\xfe") + struct.pack("<II", 4, 1)),
    "alignment 0": lying(values=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 0)),
    "dimensions without end": lying(
        tensors=1, rest=text(b"x") + struct.pack("<I", 2**32 - 1) + bytes(64)
    ),
    "five dimensions": lying(
        tensors=1, rest=text(b"x") + struct.pack("<I5QIQ", 5, 1, 1, 1, 1, 1, 0, 0) + bytes(64)
    ),
    "no dimension": lying(tensors=1, rest=text(b"x") + struct.pack("<IIQ", 0, 2, 0) + bytes(64)),
    "no elements": lying(tensors=1, rest=text(b"x") + TENSOR.pack(2, 0, 2, 0, 0) + bytes(64)),
    "sizes that overflow": lying(
        tensors=1, rest=text(b"x") + TENSOR.pack(2, 2**33, 2**33, 0, 0) + bytes(64)
    ),
    "more data than the file": lying(
        tensors=1, rest=text(b"x") + TENSOR.pack(2, 64, 64, 0, 0) + bytes(64)
    ),
    "offset that wraps": lying(
        tensors=1, rest=text(b"x") + TENSOR.pack(2, 2, 2, 0, 2**64 - 32) + bytes(64)
    ),
    "unknown type of block": lying(
        tensors=1, rest=text(b"x") + TENSOR.pack(2, 2, 2, 99, 0) + bytes(64)
    ),
    "half a block": lying(tensors=1, rest=text(b"x") + TENSOR.pack(2, 31, 2, 2, 0) + bytes(64)),
    "twice the same tensor": lying(
        tensors=2, rest=(text(b"x") + TENSOR.pack(2, 2, 2, 0, 0)) * 2 + bytes(96)
    ),
    "tensors over each other": lying(
        tensors=2,
        rest=b"".join(text(x) + TENSOR.pack(2, 2, 2, 0, 0) for x in (b"x", b"y")) + bytes(96),
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_lie_are_refused_at_once(tmp_path, case):
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[case])
    for opener in (open_gguf, load_tokenizer):
        with pytest.raises(
            ValueError, match="not a valid GGUF file|general.architecture|tokenizer.ggml.tokens"
        ):
            opener(path)
    if case not in ("alignment 0",):
        with pytest.raises(ValueError, match="not a valid GGUF file"):
            GgufHeader(path)


def test_changed_bytes_give_an_error_or_a_model(tmp_path):
    """Every byte of the header in turn, and the file cut there."""
    whole = write(
        tmp_path / "whole.gguf", stock(), metadata=lambda writer: writer.add_token_list(["a", "b"])
    ).read_bytes()
    path, rng = tmp_path / "changed.gguf", np.random.default_rng(0)
    refused = 0
    for place in range(0, 1500, 3):
        changed = bytearray(whole)
        changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed if place % 2 else whole[:place])
        try:
            source = open_gguf(path).source
            source.read(next(iter(source.headers())))
        except ValueError:
            refused += 1
    assert refused > 250


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = write(tmp_path / "model.gguf", stock())
    source = open_gguf(path).source
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="ends within"):
        for name in source.headers():
            source.read(name)


def sentencepiece_tokenizer(prefix: bool = True):
    """Bytes, words of a few merges, and tokens that are matched whole."""
    words = ["\u2581", "a", "b", "c", "1", "ab", "\u2581a", "\u2581ab", "abc", "\u2581\u2581"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "<user>"]
    merges = [
        ("a", "b"),
        ("\u2581", "ab"),
        ("\u2581", "a"),
        ("\u2581a", "b"),
        ("ab", "c"),
        ("\u2581", "\u2581"),
    ]
    merges.sort(key=lambda pair: words.index("".join(pair)))
    backend = Tokenizer(
        models.BPE(
            {token: place for place, token in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    backend.model.byte_fallback = True
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_tokens([AddedToken("<user>", normalized=False)])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=True,
        chat_template="{{ messages[0]['content'] }}!",
        **named,
    )


TEXTS = [
    "a",
    "ab abc  c",
    " ab<user> a",
    "",
    "na\u00efve \u6771\u4eac 2024\n",
    "</s>a<s>",
    "abcabcab   ab",
]


def same(one, other) -> bool:
    """Whether two tokenizers do the same with texts, and say the same of themselves."""
    named = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
    return (
        all(one(text).input_ids == other(text).input_ids for text in TEXTS)
        and all(
            one.decode(one(text).input_ids) == other.decode(one(text).input_ids) for text in TEXTS
        )
        and all(
            one.decode(one(text).input_ids, skip_special_tokens=True)
            == other.decode(one(text).input_ids, skip_special_tokens=True)
            for text in TEXTS
        )
        and all(getattr(one, name) == getattr(other, name) for name in named)
    )


def own(model) -> MllamaForConditionalGeneration:
    """Our model with the weights of a stock one."""
    ours = MllamaForConditionalGeneration(model.config).to(model.dtype).eval()
    state = {
        re.sub("^model\\.", "language_model.", name): value
        for name, value in model.state_dict().items()
    }
    torch.nn.Module.load_state_dict(ours, state)
    return ours


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_what_is_written_comes_back(tmp_path, architecture, dtype, make_tokenizer):
    torch_dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    model = stock(architecture, vocab_size=330).to(torch_dtype)
    ours, tokenizer = own(model), make_tokenizer(adds_bos=True)
    path = tmp_path / "new" / "model.gguf"
    save_gguf(ours, tokenizer, path, dtype)
    again = MllamaForConditionalGeneration.from_pretrained(path)
    assert again.dtype == torch_dtype and [entry.name for entry in path.parent.iterdir()] == [
        "model.gguf"
    ]
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items()
    )
    kept = (
        "hidden_size",
        "head_dim",
        "rms_norm_eps",
        "rope_parameters",
        "max_position_embeddings",
        "tie_word_embeddings",
        "vocab_size",
    )
    assert all(getattr(again.config, name) == getattr(ours.config, name) for name in kept)
    assert same(load_tokenizer(path), tokenizer)


def test_the_file_is_as_llama_cpps_converter_writes_it(tmp_path, make_tokenizer):
    """Names, order of dimensions, permutation, types and keys; `write` spells the converter out."""
    model = stock(rope_parameters=LLAMA3, vocab_size=330)
    written = write(
        tmp_path / "wanted.gguf", model, Type.F16, extra={"rope_freqs.weight": factors(LLAMA3)}
    )
    save_gguf(own(model), make_tokenizer(), tmp_path / "model.gguf", "f16")
    wanted, found = gguf.GGUFReader(written), gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = [{tensor.name: tensor for tensor in reader.tensors} for reader in (wanted, found)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        other = tensors[1][name]
        assert (tensor.tensor_type, tensor.shape.tolist()) == (
            other.tensor_type,
            other.shape.tolist(),
        )
        assert np.allclose(tensor.data, other.data, rtol=1e-6, atol=0)
    for key, field in wanted.fields.items():
        if not key.startswith("GGUF."):
            assert (found.fields[key].types, found.fields[key].contents()) == (
                field.types,
                field.contents(),
            ), key
    said = {key: field.contents() for key, field in found.fields.items()}
    assert (
        said["general.file_type"] == 1
        and said["llama.vocab_size"] == 330
        and said["llama.rope.dimension_count"] == 16
    )
    assert (
        said["tokenizer.ggml.model"] == "gpt2"
        and said["tokenizer.ggml.pre"] == "gpt-2"
        and len(said["tokenizer.ggml.tokens"]) == 330
    )


def test_q8_0(tmp_path, make_tokenizer):
    model = stock(vocab_size=330, intermediate_size=80)  # ffn_down's rows are no multiple of 32
    ours = own(model)
    save_gguf(ours, make_tokenizer(), tmp_path / "model.gguf", "q8_0")
    kinds = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    assert (
        kinds["blk.0.attn_q.weight"],
        kinds["blk.0.ffn_down.weight"],
        kinds["blk.0.attn_norm.weight"],
    ) == ("Q8_0", "F16", "F32")
    again = MllamaForConditionalGeneration.from_pretrained(tmp_path / "model.gguf")
    for name, value in ours.state_dict().items():
        assert (again.state_dict()[name] - value).abs().max() <= value.abs().max() / 220


def test_a_scaling_of_another_original_context_comes_back(tmp_path, make_tokenizer):
    ours = own(
        stock(vocab_size=330, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 64})
    )
    save_gguf(ours, make_tokenizer(), tmp_path / "model.gguf")
    again = MllamaForConditionalGeneration.from_pretrained(tmp_path / "model.gguf")
    assert again.config.rope_parameters == ours.config.rope_parameters
    for name, value in (("low_freq_factor", 2.0), ("factor", 0.5)):
        ours = own(stock(vocab_size=330, rope_parameters=LLAMA3 | {name: value}))
        with pytest.raises(ValueError, match="rope_parameters"):
            save_gguf(ours, make_tokenizer(), tmp_path / "other.gguf")


@pytest.mark.parametrize("length", [0, 2**40])
def test_an_original_context_that_cannot_be_is_refused(length, tmp_path):
    path = write(
        tmp_path / "model.gguf",
        stock(rope_parameters=LLAMA3),
        metadata=lambda writer: writer.add_uint64(
            "llama.rope.scaling.original_context_length", length
        ),
        extra={"rope_freqs.weight": factors(LLAMA3)},
    )
    with pytest.raises(ValueError, match="llama.rope.scaling.original_context_length must be"):
        open_gguf(path)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers(tmp_path, prefix):
    tokenizer = sentencepiece_tokenizer(prefix)
    path = tmp_path / "model.gguf"
    save_gguf(own(stock("gemma", vocab_size=280)), tokenizer, path)
    again = load_tokenizer(path)
    assert same(again, tokenizer)
    assert again.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab!"
    assert GgufHeader(path).get("tokenizer.ggml.model", str) == "llama"


@pytest.mark.parametrize("pre", ["llama-bpe", "smollm", "gpt-2", "default"])
def test_pre_tokenizers_by_llama_cpps_names(tmp_path, make_tokenizer, pre):
    """Expected pieces by hand, from the regular expressions of llama.cpp's llama-vocab.cpp."""
    pieces = {
        "llama-bpe": ["I", "'LL", " pay", " ", "123", "45", "!!\n\n", " ", " ok"],
        "smollm": ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", "!!", "\n\n ", " ok"],
        "gpt-2": ["I", "'", "LL", " pay", " 12345", "!!", "\n\n ", " ok"],
        "default": ["I", "'", "LL", " pay", " ", "123", "45", "!!", "\n\n ", " ok"],
    }
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = PRE[pre]
    save_gguf(own(stock(vocab_size=330)), tokenizer, tmp_path / "model.gguf")
    again = load_tokenizer(tmp_path / "model.gguf").backend_tokenizer.pre_tokenizer
    found = again.pre_tokenize_str("I'LL pay 12345!!\n\n  ok")
    assert [piece.replace("\u0120", " ").replace("\u010a", "\n") for piece, _ in found] == pieces[
        pre
    ]
    assert GgufHeader(tmp_path / "model.gguf").get("tokenizer.ggml.pre", str) == pre


def test_of_a_vision_language_model_the_text_part_is_written(tmp_path, make_tokenizer):
    ours = tiny.model(text={"vocab_size": 330})
    with pytest.warns(UserWarning, match="gets the text part of the model"):
        save_gguf(ours, make_tokenizer(), tmp_path / "model.gguf", "f16")
    again = MllamaForConditionalGeneration.from_pretrained(tmp_path / "model.gguf", dtype="float32")
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        difference = again(input_ids=ids).logits - ours(input_ids=ids).logits
    assert difference.abs().max() < 0.05


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, make_tokenizer):
    tokenizer, path = make_tokenizer(), tmp_path / "out" / "model.gguf"
    ours = own(stock(vocab_size=330))
    lowercase = make_tokenizer()
    lowercase.backend_tokenizer.normalizer = normalizers.Lowercase()
    for arguments, error, said in (
        (
            (ours, tokenizer, path, "q4_1"),
            ValueError,
            "dtype must be one of 'f16', 'bf16', 'q8_0', 'q4_0', 'q4_k', got 'q4_1'",
        ),
        ((ours, object(), path), TypeError, "tokenizer must be a fast tokenizer"),
        (
            (own(stock(vocab_size=300)), tokenizer, path),
            ValueError,
            "an embedding matrix of 300 rows",
        ),
        ((ours, lowercase, path), ValueError, "its normalizer .*Lowercase"),
        (
            (own(stock(vocab_size=330, hidden_act="gelu_pytorch_tanh")), tokenizer, path),
            ValueError,
            "hidden_act 'gelu_pyt",
        ),
    ):
        with pytest.raises(error, match=said):
            save_gguf(*arguments)
    with torch.no_grad():
        ours.language_model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="blk.0.ffn_up.weight"):
        save_gguf(ours, tokenizer, path)
    crossed = make_stock("mllama")
    with pytest.raises(ValueError, match="cross_attention_layers"):
        save_gguf(MllamaForConditionalGeneration(crossed.config), tokenizer, path)
    with pytest.raises(TypeError, match="model"):  # transformers' own
        save_gguf(crossed, tokenizer, path)
    assert not list(path.parent.glob("*"))


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (lambda writer: None, "has no tokenizer.ggml.tokens"),
        (lambda writer: writer.add_token_list(["a", "a"]), "must be distinct texts"),
        (
            lambda writer: (writer.add_token_list(["a", "b"]), writer.add_token_types([1])),
            "one tokenizer.ggml.token_type each",
        ),
        (
            lambda writer: writer.add_token_list(["a" * 600]),
            "a token has 600 characters; at most 512 are read",
        ),
        (
            lambda writer: (writer.add_token_list(["a"]), writer.add_tokenizer_model("bert")),
            "'bert'",
        ),
        (
            lambda writer: (writer.add_token_list(["a"]), writer.add_tokenizer_model("llama")),
            "has no tokenizer.ggml.scores",
        ),
        (
            lambda writer: (
                writer.add_token_list(["a"]),
                writer.add_tokenizer_model("gpt2"),
                writer.add_tokenizer_pre("qwen2"),
            ),
            "'qwen2'",
        ),
        (
            lambda writer: (
                writer.add_token_list(["a"]),
                writer.add_tokenizer_model("gpt2"),
                writer.add_token_merges(["a b"]),
            ),
            "the tokenizer cannot be",
        ),
        (
            lambda writer: (
                writer.add_token_list(["a"]),
                writer.add_tokenizer_model("gpt2"),
                writer.add_bos_token_id(7),
            ),
            "bos_token_id is 7",
        ),
    ],
)
def test_tokenizers_that_cannot_be(tmp_path, add, said):
    with pytest.raises(ValueError, match=said):
        load_tokenizer(write(tmp_path / "model.gguf", stock(), metadata=add))
