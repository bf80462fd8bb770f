"""GGUF blocks as packed weights, against the gguf library's dequantize."""

import pytest
import torch

import devices
from helpers import instruction_set, instruction_sets, needs_kernels
from mllama.ops import pack_gguf, pack_weight, packed_linear, unpack_gguf, unpack_weight
from mllama.ops.packed_gguf import GGUF_BLOCKS, reference
from mllama.ops.packed_layout import pack, unpack
from mllama.ops.packed_linear import reference as product

gguf = pytest.importorskip("gguf")

# Where the f16 numbers of a block are, in bytes.
SCALES = {packing: range(0, 2, 2) for packing in ("int8", "q4_0", "q5_0")}
SCALES |= {packing: range(0, 4, 2) for packing in ("q4_1", "q5_1", "q4_k", "q5_k")}
SCALES |= {"q6_k": range(208, 210, 2)}
OUT, IN = 37, 768


def kind_of(packing):
    return gguf.GGMLQuantizationType[{"int8": "Q8_0"}.get(packing, packing.upper())]


def random_blocks(packing, out=OUT, width=IN, seed=0):
    """Every byte at random, but scales that are numbers."""
    generator = devices.generator(seed)
    inputs, size = GGUF_BLOCKS[packing]
    shape = (out, width // inputs, size)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    for start in SCALES[packing]:
        scale = torch.randn(*shape[:2], 1, generator=generator).half()
        blocks[..., start : start + 2] = scale.view(torch.uint8)
    return blocks.flatten(1)


def dequantized(blocks, packing):
    dense = torch.from_numpy(gguf.dequantize(blocks.cpu().numpy(), kind_of(packing)))
    return dense.to(blocks.device)


@pytest.mark.parametrize("packing", GGUF_BLOCKS)
def test_sizes_are_the_gguf_librarys(packing):
    assert GGUF_BLOCKS[packing] == gguf.GGML_QUANT_SIZES[kind_of(packing)]


@pytest.mark.parametrize("packing", GGUF_BLOCKS)
@pytest.mark.parametrize("size", [(OUT, IN), (16, 256), (1, 512), (0, 256)])
def test_reference_holds_the_blocks(packing, size):
    blocks = random_blocks(packing, *size)
    packed = reference(blocks, packing)
    if len(blocks):
        assert torch.equal(unpack(packed, *size, packing), dequantized(blocks, packing))
    assert torch.equal(unpack_gguf(packed, *size, packing), blocks)


@needs_kernels
@pytest.mark.parametrize("packing", GGUF_BLOCKS)
def test_kernels_hold_the_blocks(packing):
    blocks = random_blocks(packing)
    dense = dequantized(blocks, packing)
    x = torch.randn(40, IN)
    for isa in instruction_sets():
        with instruction_set(isa):
            packed = pack_gguf(blocks, packing)
            assert torch.equal(packed, reference(blocks, packing))
            assert torch.equal(unpack_weight(packed, OUT, IN, packing), dense)
            assert torch.equal(
                pack_gguf(blocks[::2], packing), pack_gguf(blocks[::2].clone(), packing)
            )
            for rows in (1, 2, 9, 40):
                y = packed_linear(x[:rows], packed, out_features=OUT, packing=packing)
                expected = product(x[:rows], packed, out_features=OUT, packing=packing)
                assert (y - expected).norm() <= 1e-5 * expected.norm()


@needs_kernels
@pytest.mark.parametrize("packing", GGUF_BLOCKS)
def test_sums_of_the_largest_codes_fit(packing):
    """All codes at either end, and so x: nothing saturates in 16 bits."""
    size = GGUF_BLOCKS[packing][1]
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        blocks = torch.full((16, 2 * size), byte, dtype=torch.uint8)
        for start in SCALES[packing]:
            one = torch.tensor([0x00, 0x3C], dtype=torch.uint8)  # 1.0
            blocks.unflatten(1, (2, size))[..., start : start + 2] = one
        packed = pack_gguf(blocks, packing)
        width = 2 * GGUF_BLOCKS[packing][0]
        ones = torch.ones(1, width)
        for x in (ones, -ones, ones.expand(40, width), -ones.expand(40, width)):
            expected = product(x, packed, out_features=16, packing=packing)
            for isa in instruction_sets():
                with instruction_set(isa):
                    y = packed_linear(x, packed, out_features=16, packing=packing)
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("packing", GGUF_BLOCKS)
def test_quantized_weights_become_blocks(packing):
    """What is packed from floats is, as blocks, the same weight."""
    w = torch.randn(OUT, IN) / 20
    for function in (pack, pack_weight):
        packed = function(w, packing)
        blocks = unpack_gguf(packed, OUT, IN, packing)
        assert torch.equal(dequantized(blocks, packing), unpack(packed, OUT, IN, packing))
        assert torch.equal(
            unpack(pack_gguf(blocks, packing), OUT, IN, packing), unpack(packed, OUT, IN, packing)
        )


@pytest.mark.parametrize("function", [pack_gguf, reference])
@pytest.mark.parametrize("packing", GGUF_BLOCKS)
def test_scales_that_are_not_finite(packing, function):
    for start in SCALES[packing]:
        for bits in (0x7C00, 0xFC00, 0x7E01):
            blocks = random_blocks(packing)
            at = GGUF_BLOCKS[packing][1] + start
            blocks[20, at : at + 2] = torch.tensor([bits & 255, bits >> 8], dtype=torch.uint8)
            with pytest.raises(ValueError, match="blocks"):
                function(blocks, packing)


def test_calls_that_are_refused():
    blocks = random_blocks("q4_k")
    with pytest.raises(ValueError, match="packing"):
        pack_gguf(blocks, "int4")
    with pytest.raises(ValueError, match="packing"):
        pack_gguf(blocks, "q3_k")
    with pytest.raises(ValueError, match="blocks"):
        pack_gguf(blocks[:, 1:], "q4_k")
    with pytest.raises(ValueError, match="blocks"):
        pack_gguf(blocks[0], "q4_k")
    with pytest.raises(TypeError, match="blocks"):
        pack_gguf(blocks.float(), "q4_k")
    with pytest.raises(TypeError, match="blocks"):
        pack_gguf(None, "q4_k")
    packed = pack_gguf(blocks, "q4_k")
    with pytest.raises(ValueError, match="in_features"):
        unpack_gguf(packed, OUT, 100, "q4_k")
    with pytest.raises(ValueError, match="packed"):
        unpack_gguf(packed[1:], OUT, IN, "q4_k")
    with pytest.raises(ValueError, match="packing"):
        unpack_gguf(packed, OUT, IN, "int4")


@needs_kernels
def test_fake():
    blocks = random_blocks("q6_k").cpu()  # other devices have no kernel
    torch.library.opcheck(torch.ops.mllama.pack_gguf.default, (blocks, 11))
