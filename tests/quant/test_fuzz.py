"""Files and packed weights whose bytes are wrong: a ValueError, or a sound read."""

import os

import pytest
import torch

from helpers import instruction_set, instruction_sets, needs_kernels
from mllama.ops import packed_linear, unpack_weight
from mllama.ops.packed_layout import PACKINGS, packed_bytes

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

from checkpoints.test_gguf import stock, write  # noqa: E402
from mllama.checkpoints.gguf.blocks import to_blocks  # noqa: E402
from mllama.checkpoints.gguf.reader import open_gguf  # noqa: E402
from mllama.ops.packed_gguf import GGUF_BLOCKS  # noqa: E402
from mllama.quant.packer import FILE  # noqa: E402
from mllama.runtime.loading import load_core  # noqa: E402
from mllama.runtime.session import Session  # noqa: E402
from ops.test_packed_gguf import kind_of, random_blocks  # noqa: E402

pytestmark = needs_kernels
COUNT = 20_000 if os.environ.get("MLLAMA_LARGE_TESTS") else 300
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
# Types of the layer's matrices, in the order of the file; every format is among them.
KINDS = ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q3_K"]


def make_file(path) -> tuple[bytes, int]:
    """A file of a model with all types, and where its tensors begin."""
    model = stock(vocab_size=40, **SIZES)
    write(path, model)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    kinds = iter(KINDS)
    for tensor in reader.tensors:
        data = torch.from_numpy(tensor.data.copy())
        kind = gguf.GGMLQuantizationType[next(kinds)] if data.dim() > 1 else None
        if kind is None:
            writer.add_tensor(tensor.name, data.numpy())
        else:
            writer.add_tensor(tensor.name, blocks_of(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = path.with_suffix(".new")
    return path.read_bytes(), int(gguf.GGUFReader(path).data_offset)


def blocks_of(data: torch.Tensor, kind) -> "np.ndarray":
    name = kind.name.lower()
    if name == "q5_k":
        return random_blocks("q5_k", *data.shape).numpy()
    if name == "q3_k":  # dequantized when it is read
        return np.zeros((len(data), 110 * data.shape[1] // 256), np.uint8)
    return to_blocks("x", data, kind)


def changed(whole: bytes, start: int, rng) -> bytes:
    """A few bytes of the header or of the tensors altered, or the end cut off."""
    data = bytearray(whole)
    choice = rng.integers(0, 10)
    low, high = (0, start) if choice < 5 else (start, len(data))
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(low, high))
        data[place] = int(rng.choice([0, 0x7C, 0x7F, 0x80, 0xFF, rng.integers(0, 256)]))
    if choice == 9:
        del data[int(rng.integers(0, len(data))) :]
    return bytes(data)


def answer(path) -> list[int]:
    """Two tokens of the packed file: a prefill and a `decode_step`."""
    model = load_core(open_gguf(path), torch.float32, "cpu", weights=FILE)
    result = Session(model).generate({"input_ids": torch.tensor([[3, 1, 4]])}, max_new_tokens=2)
    return result.completions[0].token_ids


def test_files(tmp_path):
    whole, start = make_file(tmp_path / "whole.gguf")
    path, rng = tmp_path / "changed.gguf", np.random.default_rng(0)
    path.write_bytes(whole)
    assert len(answer(path)) == 2
    refused = 0
    for _ in range(COUNT):
        path.write_bytes(changed(whole, start, rng))
        try:
            assert all(0 <= token < 40 for token in answer(path))
        except ValueError:
            refused += 1
    assert 0.1 * COUNT < refused < 0.9 * COUNT


def test_a_bad_scale_names_its_tensor(tmp_path):
    whole, start = make_file(tmp_path / "whole.gguf")
    path = tmp_path / "changed.gguf"
    path.write_bytes(whole)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in tensors.items():
        packing = {"Q8_0": "int8"}.get(tensor.tensor_type.name, tensor.tensor_type.name.lower())
        if packing not in GGUF_BLOCKS:
            continue
        data, last = bytearray(whole), tensor.data_offset + tensor.n_bytes
        at = last - 2 if packing == "q6_k" else last - GGUF_BLOCKS[packing][1]
        data[at : at + 2] = b"\x00\x7c"  # infinity
        path.write_bytes(data)
        with pytest.raises(ValueError, match=name):
            answer(path)


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_weights(packing):
    """Any bytes are codes and scales of something; any other number of them is refused."""
    generator = torch.Generator().manual_seed(0)
    for case in range(COUNT // len(PACKINGS)):
        out, width = (int(torch.randint(1, 70, (), generator=generator)) for _ in range(2))
        width *= 1 if case % 2 else 9
        size = packed_bytes(out, width, packing)
        packed = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        x = torch.randn(case % 5, width, generator=generator)
        with instruction_set(instruction_sets()[case % len(instruction_sets())]):
            y = packed_linear(x, packed, out_features=out, packing=packing)
            assert y.shape == (case % 5, out)
            rows = torch.randint(0, out, (3,), generator=generator)
            assert unpack_weight(packed, out, width, packing, rows=rows).shape == (3, width)
            assert unpack_weight(packed, out, width, packing).shape == (out, width)
            for wrong in (packed[1:], packed[: size // 2], torch.cat([packed, packed])):
                with pytest.raises(ValueError, match="weight"):
                    packed_linear(x, wrong, out_features=out, packing=packing)


def test_every_format_is_in_the_file():
    assert {kind_of(packing).name for packing in GGUF_BLOCKS} <= set(KINDS)
