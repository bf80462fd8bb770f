import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mllama.processing.image import load_image, load_pixels, normalization_table

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GRAY = RGB[:, :, 0]
ALPHA = np.linspace(0, 255, 54).astype(np.uint8).reshape(6, 9)


def three(gray):
    return np.repeat(gray[:, :, None], 3, axis=2)


def on_white(color, alpha):
    """What an image of that opacity looks like on white, exactly."""
    share = alpha[:, :, None] / 255
    return color * share + 255 * (1 - share)


def same(image, expected, within=0):
    actual = load_pixels(image).numpy()
    assert actual.shape == expected.shape and actual.dtype == np.uint8
    assert np.abs(actual.astype(float) - expected).max() <= within


def test_the_same_image_in_every_wrapping(tmp_path):
    image = Image.fromarray(RGB)
    image.save(tmp_path / "a.png")
    chw = np.ascontiguousarray(RGB.transpose(2, 0, 1))
    wrappings = [image, tmp_path / "a.png", str(tmp_path / "a.png")]
    wrappings += [RGB, RGB[:, ::-1][:, ::-1], chw, RGB / 255, RGB.astype(np.float32) / 255]
    wrappings += [
        torch.from_numpy(RGB),
        torch.from_numpy(chw),
        torch.from_numpy(chw / 255),
        torch.from_numpy(chw) / 255,
    ]
    for wrapping in wrappings:
        same(wrapping, RGB)
        assert (
            np.array_equal(np.array(load_image(wrapping)), RGB)
            and load_image(wrapping).mode == "RGB"
        )


def test_16_bit_floats_are_rounded():
    for dtype in (torch.bfloat16, torch.float16):
        same((torch.from_numpy(RGB.transpose(2, 0, 1).copy()) / 255).to(dtype), RGB, within=1)


def test_gray_and_boolean():
    for gray in (Image.fromarray(GRAY), GRAY, GRAY[:, :, None], GRAY[None], torch.from_numpy(GRAY)):
        same(gray, three(GRAY))
    for black_and_white in (Image.fromarray(GRAY > 99), GRAY > 99, torch.from_numpy(GRAY > 99)):
        same(black_and_white, three((GRAY > 99) * 255))


def test_palette_and_other_color_spaces():
    image = Image.fromarray(RGB)
    for other in (
        image.quantize(16),
        image.convert("CMYK"),
        image.convert("YCbCr"),
        image.convert("HSV"),
    ):
        same(other, np.array(other.convert("RGB")))


def test_transparency_goes_onto_white():
    rgba = np.dstack([RGB, ALPHA])
    same(Image.fromarray(rgba), on_white(RGB, ALPHA), within=1)
    same(rgba, on_white(RGB, ALPHA), within=1)
    same(torch.from_numpy(rgba.transpose(2, 0, 1).copy()), on_white(RGB, ALPHA), within=1)
    same(Image.fromarray(np.dstack([GRAY, ALPHA])), on_white(three(GRAY), ALPHA), within=1)
    hidden = np.dstack([RGB, np.zeros_like(GRAY)])
    same(Image.fromarray(hidden), np.full_like(RGB, 255))


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_color_goes_onto_white(tmp_path, mode):
    image = Image.fromarray(np.where(GRAY > 99, 255, 7).astype(np.uint8)).convert(mode)
    key = image.getpixel((0, 0))
    image.save(tmp_path / "key.png", transparency=key)
    colors = np.array(image.convert("RGB"))
    expected = np.where((colors == colors[0, 0]).all(axis=2, keepdims=True), 255, colors)
    same(tmp_path / "key.png", expected)


def test_16_bit_gray_is_scaled(tmp_path):
    values = (np.arange(54).reshape(6, 9) * 1236).astype(np.uint16)
    expected = three(np.rint(values / 257))
    values[0, 0] = 65535
    expected[0, 0] = 255
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(values).save(tmp_path / "deep.tif")
    big_endian, wide = (
        Image.frombytes("I;16B", (9, 6), values.astype(">u2").tobytes()),
        Image.fromarray(values.astype(np.int32)),
    )
    assert wide.mode == "I"
    for deep in (
        Image.fromarray(values),
        big_endian,
        wide,
        tmp_path / "deep.png",
        tmp_path / "deep.tif",
    ):
        same(deep, expected)
    for deep in (values, values.astype(">u2"), values.astype("<u2"), np.dstack([values] * 3)):
        same(deep, expected)
    with pytest.raises(ValueError, match="-1..5"):
        load_image(Image.fromarray(np.array([[-1, 5]], dtype=np.int32)))


def test_gray_of_32_bits_with_values_of_8(tmp_path):
    values = np.array([[0, 128, 255]], dtype=np.int32)
    wide = Image.fromarray(values)
    wide.save(tmp_path / "wide.tif")
    for shallow in (wide, Image.fromarray(values.astype(np.uint8)).convert("I")):
        same(shallow, three(values))
    same(tmp_path / "wide.tif", three(values))
    wide.save(tmp_path / "dark.pgm")  # 16 bits, and dark
    for deep in (tmp_path / "dark.pgm", Image.open(tmp_path / "dark.pgm")):
        same(deep, three(np.array([[0, 0, 1]])))


def test_a_transparent_16_bit_gray_goes_onto_white(tmp_path):
    values = np.array(
        [[1285, 1286], [0, 1285]], dtype=np.uint16
    )  # 1286 is the same as the key in 8 bits, and stays
    Image.fromarray(values).save(tmp_path / "key.png", transparency=1285)
    same(tmp_path / "key.png", three(np.array([[255, 5], [0, 255]])))


def test_floats_may_be_off_by_rounding():
    exact = np.array([[0, 1], [0.5, 1]], dtype=np.float32)
    expected = three(np.array([[0, 255], [128, 255]]))
    off = exact + np.array([[-1e-7, 2e-7], [0, 2e-7]], dtype=np.float32)
    assert off.max() > 1 and off.min() < 0
    for floats in (
        off,
        off.astype(np.float64),
        off.astype(">f4"),
        torch.from_numpy(off),
        Image.fromarray(off),
    ):
        same(floats, expected)


def test_a_tensor_that_negates_on_reading():
    values = torch.linspace(-1, 0, 75, dtype=torch.float32).reshape(3, 5, 5)
    view = torch._neg_view(values)
    assert view.is_neg()
    same(view, load_pixels(-values).numpy())


def test_float_gray():
    same(Image.fromarray(GRAY.astype(np.float32)), three(GRAY))
    same(Image.fromarray(GRAY.astype(np.float32) / 255), three(GRAY))
    for wrong in ([[0.5, np.nan]], [[-1.0, 0.5]], [[300.0, 0.5]]):
        with pytest.raises(ValueError, match="must hold 0..1"):
            load_image(Image.fromarray(np.array(wrong, dtype=np.float32)))


def test_an_upright_image_is_not_copied_and_a_turned_one_not_changed():
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    assert load_image(image) is image
    image.getexif()[0x0112] = 6
    before = image.tobytes()
    assert load_image(image).size == (4, 5)
    assert (image.size, image.tobytes()) == ((5, 4), before)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    image = Image.fromarray(RGB)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Image.Transpose that makes it upright
    expected = image.transpose(Image.Transpose(turn[orientation])) if orientation > 1 else image
    same(tmp_path / "turned.png", np.array(expected))
    with Image.open(tmp_path / "turned.png") as opened:  # one that is not loaded yet
        same(opened, np.array(expected))
        same(opened, np.array(expected))  # and was not changed


def test_channels_of_ambiguous_arrays():
    cube = np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    same(cube, cube)  # numpy: channels last
    same(torch.from_numpy(cube), cube.transpose(1, 2, 0))  # torch: channels first
    line = cube[:1]
    same(line, line)
    same(torch.from_numpy(line), three(line[0]))
    same(np.zeros((1, 1, 3), dtype=np.uint8), np.zeros((1, 1, 3)))


@pytest.mark.parametrize(
    ("image", "error", "match"),
    [
        (np.zeros((0, 5, 3), dtype=np.uint8), ValueError, r"no pixels: shape \(0, 5, 3\)"),
        (torch.zeros(3, 4, 0), ValueError, r"no pixels: shape \(3, 4, 0\)"),
        (Image.new("RGB", (0, 4)), ValueError, "no pixels: 0 x 4"),
        (np.zeros((5, 6, 2), dtype=np.uint8), ValueError, r"\(5, 6, 2\)"),
        (np.zeros(5, dtype=np.uint8), ValueError, r"\(5,\)"),
        (np.zeros((2, 3, 5, 5), dtype=np.uint8), ValueError, r"\(2, 3, 5, 5\)"),
        (np.zeros((5, 5, 3), dtype=np.int64), TypeError, "uint8, uint16, bool or float, got int64"),
        (np.full((5, 5, 3), 255.0), ValueError, "must hold 0..1, got 255..255"),
        (np.full((5, 5, 3), 1.00001), ValueError, "must hold 0..1, got 1.00001..1.00001"),
        (Image.fromarray(np.full((5, 5), 300, np.float32)), ValueError, "mode F"),
        (
            torch.zeros(3, 5, 5, device="meta"),
            ValueError,
            r"is a meta tensor, without values: shape \(3, 5, 5\)",
        ),
        (torch.full((3, 5, 5), float("nan")), ValueError, "must hold 0..1, got nan"),
        ([1, 2, 3], TypeError, "got list"),
        (None, TypeError, "got NoneType"),
        (b"bytes", ValueError, "no image of a known format"),
        (
            "https://example.org/cat.png",
            ValueError,
            "allow_urls=True .*, got https://example.org/cat.png",
        ),
        ("data:image/png;base64," + "A" * 9999, ValueError, "no image of a known format"),
        ("no/such/cat.png", FileNotFoundError, "no/such/cat.png"),
        (Path("no/such/cat.png"), FileNotFoundError, "no/such/cat.png"),
        ("x" * 9999, FileNotFoundError, "no such image"),
        (".", ValueError, "is a folder"),
    ],
    ids=lambda value: "" if isinstance(value, (np.ndarray, torch.Tensor, str)) else None,
)
def test_what_is_refused(image, error, match):
    with pytest.raises(error, match=match) as caught:
        load_pixels(image)
    assert type(caught.value) is error


def half_of(form):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
        buffer, form
    )
    return buffer.getvalue()[: buffer.tell() // 2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.png", b""),
        ("text.jpg", b"this is no image"),
        ("cut.png", half_of("PNG")),
        ("cut.jpg", half_of("JPEG")),
        ("header.png", half_of("PNG")[:20]),
        ("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"),
    ],
)
def test_files_that_are_no_images(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read the image .*{name}") as caught:
        load_image(tmp_path / name)
    assert type(caught.value) is ValueError


def test_a_broken_image_opened_elsewhere(tmp_path):
    (tmp_path / "cut.png").write_bytes(half_of("PNG"))
    with (
        Image.open(tmp_path / "cut.png") as image,
        pytest.raises(ValueError, match="cannot read the image .*cut.png"),
    ):
        load_image(image)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "limit", [40, 20]
)  # Pillow warns above the limit, and raises above twice that
def test_too_many_pixels(tmp_path, monkeypatch, limit):
    Image.fromarray(RGB).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match="cannot read the image .*bomb.png.*pixels"):
        load_image(tmp_path / "bomb.png")


def test_normalization_is_transformers(tmp_path):
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    every = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    stock = SiglipImageProcessorPil(do_resize=False, image_mean=list(mean), image_std=list(std))
    expected = stock(Image.fromarray(every), return_tensors="pt").pixel_values[0, :, 0].T
    assert torch.equal(normalization_table(mean, std), expected)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,) * 3), ((0.5,) * 3, (0.5, 0.0, 0.5))])
def test_normalization_that_cannot_be(mean, std):
    with pytest.raises(ValueError, match="image_mean|image_std"):
        normalization_table(mean, std)
