import numpy as np
import pytest
import torch
from PIL import Image

import devices
from helpers import THROWN, BadCall, instruction_set, instruction_sets, needs_kernels
from mllama.ops import image as op
from mllama.ops import resize, resize_normalize
from mllama.processing.image import normalization_table

TABLE = normalization_table((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)).to(devices.tensor_device())
# (H, W) to (height, width): up, down, one of each, one pixel, a line, odd sizes, the same size;
# several bands of rows and blocks of their inputs, also where a band needs few inputs or all.
SIZES = [
    ((37, 51), (96, 64)),
    ((131, 173), (32, 33)),
    ((200, 20), (21, 75)),
    ((20, 200), (75, 21)),
    ((1, 1), (1, 1)),
    ((1, 1), (7, 5)),
    ((9, 7), (1, 1)),
    ((1, 301), (17, 17)),
    ((301, 1), (17, 17)),
    ((305, 3), (16, 16)),
    ((64, 48), (64, 31)),
    ((64, 48), (31, 48)),
    ((40, 40), (40, 40)),
    ((2, 3), (3, 2)),
    ((257, 129), (100, 65)),
    ((97, 140), (97, 65)),
    ((65, 30), (130, 30)),
    ((9, 11), (131, 67)),
    ((3, 5), (40, 129)),
    ((900, 7), (33, 3)),
    ((5, 900), (70, 33)),
]


def pixels(height, width, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(values).to(devices.tensor_device())


def some_sizes(count):
    """Sizes from 1 to 200, evenly over their logarithms."""
    drawn = (
        np.exp(np.random.default_rng(5).uniform(0, np.log(200), (count, 4))).astype(int).tolist()
    )
    return [((a, b), (c, d)) for a, b, c, d in drawn]


def in_two_steps(image, height, width, height_first):
    """One direction at a time, each by Pillow: what the order of the passes means."""
    source = Image.fromarray(image.cpu().numpy())
    between = (source.width, height) if height_first else (width, source.height)
    resized = source.resize(between, Image.Resampling.BICUBIC).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return torch.from_numpy(np.array(resized)).to(image.device)


@needs_kernels
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16"])
def test_every_bit_is_pillows(isa):
    if isa not in instruction_sets():
        pytest.skip(f"this CPU has no {isa}")
    with instruction_set(isa):
        for number, ((in_height, in_width), (height, width)) in enumerate(SIZES + some_sizes(60)):
            # Black and white as well: the cubic's overshoot must be clipped.
            image = (
                pixels(in_height, in_width)
                if number % 3
                else pixels(in_height, in_width) // 128 * 255
            )
            for resample in ("bicubic", "bilinear"):
                what = f"{in_height} x {in_width} to {height} x {width}, {resample}"
                assert torch.equal(
                    resize(image, height, width, resample),
                    op.reference(image, height, width, resample),
                ), what
                expected = op.normalize_reference(image, height, width, TABLE, resample)
                assert torch.equal(
                    resize_normalize(image, height, width, TABLE, resample), expected
                ), what


@needs_kernels
@pytest.mark.parametrize("height_first", [False, True])
def test_both_orders_of_the_passes(height_first):
    for (in_height, in_width), (height, width) in SIZES:
        image = pixels(in_height, in_width)
        actual = torch.ops.mllama.resize(image, height, width, True, height_first)
        assert torch.equal(actual, in_two_steps(image, height, width, height_first))


@pytest.mark.parametrize(
    ("version", "sizes", "height_first"),
    [
        ((12, 1), (500, 4, 10, 10), False),
        ((12, 2), (500, 4, 10, 10), True),
        ((12, 2), (400, 4, 10, 10), False),
        ((12, 3), (4, 1, 5, 1), False),
        ((13, 0), (110, 100, 10, 50), False),
        ((13, 0), (111, 100, 10, 50), True),
        ((13, 0), (50, 10, 50, 60), False),
        ((13, 0), (51, 10, 50, 60), True),
    ],
)
def test_order_of_pillows_versions(monkeypatch, version, sizes, height_first):
    monkeypatch.setattr(op, "_PILLOW", version)
    assert op._height_first(*sizes) is height_first


def test_memory_layouts():
    image = pixels(40, 60)
    for view in (
        image.transpose(0, 1),
        image.flip(1),
        image[5:30:2, 3:50:3],
        image.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ):
        assert torch.equal(resize(view, 16, 16), op.reference(view, 16, 16))


def test_the_result_is_new_memory():
    image = pixels(8, 8)
    same = resize(image, 8, 8)
    assert torch.equal(same, image) and same.data_ptr() != image.data_ptr()


@needs_kernels
@pytest.mark.skipif(devices.runs_cuda_kernels(), reason="of the CPU kernels' threads")
@pytest.mark.parametrize("height_first", [False, True])
@pytest.mark.parametrize("size", [(1601, 1200, 224, 223), (30, 1200, 1500, 1201)])
def test_same_bits_with_any_number_of_threads(size, height_first):
    image, threads = pixels(*size[:2]), torch.get_num_threads()
    expected = in_two_steps(image, *size[2:], height_first)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            actual = torch.ops.mllama.resize(image, *size[2:], True, height_first)
            assert torch.equal(actual, expected)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_operators_are_well_formed():
    image = pixels(12, 10)
    torch.library.opcheck(torch.ops.mllama.resize.default, (image, 5, 7, True, False))
    torch.library.opcheck(
        torch.ops.mllama.resize_normalize.default, (image, 5, 7, TABLE, False, True)
    )
    compiled = torch.compile(resize_normalize, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image, 5, 7, TABLE), resize_normalize(image, 5, 7, TABLE))
    torch._dynamo.reset()


IMAGE = pixels(4, 5)
BAD = [
    BadCall(
        lambda: resize(np.zeros((4, 5, 3), np.uint8), 2, 2),
        TypeError,
        "image must be a uint8 tensor, got ndarray",
    ),
    BadCall(
        lambda: resize(IMAGE.float(), 2, 2),
        TypeError,
        "image must be a uint8 tensor, got float32 tensor",
    ),
    BadCall(lambda: resize(IMAGE.permute(2, 0, 1), 2, 2), ValueError, r"image must be \[H, W, 3\]"),
    BadCall(lambda: resize(IMAGE[:, :0], 2, 2), ValueError, "not empty"),
    BadCall(lambda: resize(IMAGE.to("meta"), 2, 2), ValueError, "on the CPU"),
    BadCall(lambda: resize(IMAGE, 2.0, 2), TypeError, "height must be an int, got float"),
    BadCall(lambda: resize(IMAGE, 2, True), TypeError, "width must be an int, got bool"),
    BadCall(lambda: resize(IMAGE, 0, 2), ValueError, "height must be at least 1, got 0"),
    BadCall(lambda: resize(IMAGE, 2, -3), ValueError, "width must be at least 1, got -3"),
    BadCall(lambda: resize(IMAGE, 2**16, 2**16), ValueError, "more than"),
    BadCall(lambda: resize(IMAGE, 2**62, 2**62), ValueError, "more than"),
    BadCall(
        lambda: resize(IMAGE, 2, 2, "lanczos"),
        ValueError,
        "resample must be one of bilinear, bicubic, got 'lanczos'",
    ),
    BadCall(
        lambda: resize_normalize(IMAGE, 2, 2, TABLE.double()),
        TypeError,
        "table must be a float32 tensor, got float64 tensor",
    ),
    BadCall(
        lambda: resize_normalize(IMAGE, 2, 2, None),
        TypeError,
        "table must be a float32 tensor, got NoneType",
    ),
    BadCall(
        lambda: resize_normalize(IMAGE, 2, 2, TABLE.to("meta")),
        ValueError,
        r"table must be \[256, 3\] on .*, got \(256, 3\) on meta",
    ),
    BadCall(
        lambda: resize_normalize(IMAGE, 2, 2, TABLE.T),
        ValueError,
        r"table must be \[256, 3\] on .*, got \(3, 256\)",
    ),
]
BAD_OPERATOR_CALLS = [
    BadCall(
        lambda: torch.ops.mllama.resize(IMAGE.float(), 2, 2, True, False), THROWN, "invalid image"
    ),
    BadCall(lambda: torch.ops.mllama.resize(IMAGE[:0], 2, 2, True, False), THROWN, "invalid image"),
    BadCall(
        lambda: torch.ops.mllama.resize(IMAGE, 0, 2, True, False), THROWN, "invalid height or width"
    ),
    BadCall(
        lambda: torch.ops.mllama.resize(IMAGE, 2**62, 2**62, True, True),
        THROWN,
        "invalid height or width",
    ),
    BadCall(
        lambda: torch.ops.mllama.resize(IMAGE.repeat(2**14, 1, 1), 1, 2**13, True, False),
        THROWN,
        "invalid height or width",
    ),
    BadCall(
        lambda: torch.ops.mllama.resize_normalize(IMAGE, 2, 2, TABLE[:9], True, False),
        THROWN,
        "invalid table",
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.match)
def test_bad_calls(bad):
    with pytest.raises(bad.error, match=bad.match) as caught:
        bad.call()
    assert type(caught.value) is bad.error


@needs_kernels
@pytest.mark.parametrize("bad", BAD_OPERATOR_CALLS, ids=lambda bad: bad.match)
def test_bad_operator_calls(bad):
    with pytest.raises(bad.error, match=bad.match) as caught:
        bad.call()
    assert type(caught.value) is bad.error
