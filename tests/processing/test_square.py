import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllama.hf.processors.square import CroppedImageProcessor

SIZES = [(1, 1), (1, 90), (90, 1), (50, 37), (37, 50), (640, 480), (32, 32), (31, 33), (20, 21)]


@pytest.mark.parametrize("edge", [20, 32, 45])  # the crop sticks out, fits, cuts
@pytest.mark.parametrize(
    "crop", [{"height": 32, "width": 32}, {"height": 31, "width": 20}], ids=str
)
def test_crops_are_stock(noise, edge, crop):
    settings = {"size": {"shortest_edge": edge}, "crop_size": crop}
    ours, stock = CroppedImageProcessor(**settings), CLIPImageProcessorPil(**settings)
    for size in SIZES:
        image = noise(*size)
        expected = stock(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(ours(image, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize(
    "overrides",
    [
        {"resample": 2},
        {"resample": 0},
        {"do_center_crop": False},
        {"do_resize": False},
        {"do_normalize": False},
        {"do_rescale": False},
        {"size": {"height": 40, "width": 50}},
        {"size": {"shortest_edge": 30, "longest_edge": 40}},
    ],
    ids=str,
)
def test_options_are_stock(noise, overrides):
    settings = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    image = noise(90, 70)
    expected = CLIPImageProcessorPil(**settings)(image, return_tensors="pt", **overrides)[
        "pixel_values"
    ]
    assert torch.equal(
        CroppedImageProcessor(**settings)(image, return_tensors="pt", **overrides)["pixel_values"],
        expected,
    )


def test_every_kind_of_image_and_several(noise, tmp_path):
    processor, image = CroppedImageProcessor(), noise()
    image.save(tmp_path / "a.png")
    batch = processor([image, str(tmp_path / "a.png"), [np.array(image)]], return_tensors="pt")[
        "pixel_values"
    ]
    assert (
        batch.shape == (3, 3, 224, 224)
        and torch.equal(batch[0], batch[1])
        and torch.equal(batch[0], batch[2])
    )


@pytest.mark.parametrize("edge", [0, -5, 10**6, 10**30])
@pytest.mark.parametrize("options", [{}, {"do_normalize": False}], ids=str)
def test_hostile_sizes(noise, edge, options):
    square = {"height": edge, "width": edge}
    for settings in (
        {"size": square},
        {"size": {"shortest_edge": edge}},
        {"crop_size": square},
        {"do_pad": True, "pad_size": square},
    ):
        with pytest.raises(ValueError, match=r"16384"):
            CroppedImageProcessor(**settings)(noise(), **options)


def test_saved_as_stock(tmp_path):
    CroppedImageProcessor(crop_size={"height": 50, "width": 50}).save_pretrained(tmp_path)
    stock = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(stock) is CLIPImageProcessorPil and stock.crop_size.height == 50
