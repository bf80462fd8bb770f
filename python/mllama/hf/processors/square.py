"""Image processors with one output size: SigLIP's (resized to it) and CLIP's (shortest edge
resized, then center-cropped).

They are transformers' own on this package's image loading and C++ resize, bit-equal to
transformers' for upright 8-bit images.
"""

from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ChannelDimension
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mllama.hf.processors.options import IMAGES, check_names, check_values, in_one_line, on_cpu
from mllama.processing.image import channel_values, download_urls, load_pixels
from mllama.processing.square import RESAMPLE, SquareImages, check_edges, read_table


def with_channels(kwargs: dict) -> dict:
    """kwargs with image_mean and image_std as lists of floats: transformers' check rejects tuples
    and ints with an unclear error.
    """
    checked = {
        name: list(channel_values(name, kwargs[name]))
        for name in ("image_mean", "image_std")
        if kwargs.get(name) is not None
    }
    return {**kwargs, **checked}


class OwnImages:
    """Mixin that makes a PIL image processor of transformers accept every form that
    `mllama.processing.image.load_image` does.

    http(s) URLs are downloaded only with `allow_urls=True`. All images become RGB. It is saved
    under its parent's name, so that stock transformers can load it.
    """

    refused = IMAGES
    kind: str  # its name in files

    @on_cpu
    def preprocess(self, images, *args, allow_urls: bool = False, **kwargs) -> BatchFeature:
        check_names(self, kwargs, self.valid_kwargs.__annotations__)
        check_values(kwargs, self.refused)
        images = download_urls(images, allow_urls)
        with in_one_line():
            return super().preprocess(images, *args, **with_channels(kwargs))

    def fetch_images(self, images):
        return images

    def process_image(self, image, input_data_format: str | None = None, **kwargs) -> np.ndarray:
        if input_data_format is not None and getattr(image, "ndim", 0) == 3:
            # Arrays are read as channels last, tensors as channels first.
            is_first = input_data_format == ChannelDimension.FIRST
            if isinstance(image, np.ndarray) and is_first:
                image = image.transpose(1, 2, 0)
            elif not isinstance(image, np.ndarray) and not is_first:
                image = image.permute(2, 0, 1)
        return load_pixels(image).numpy().transpose(2, 0, 1)

    def to_dict(self) -> dict:
        return {**super().to_dict(), "image_processor_type": self.kind}


class _OneSize(OwnImages):
    """Takes single images, or flat or nested lists; returns pixel_values [images, 3, height, width]
    float32.
    """

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        if isinstance(images, (list, tuple)):
            return [image for item in images for image in self._prepare_images_structure(item)]
        return list(images) if getattr(images, "ndim", 3) == 4 else [images]

    def _preprocess(self, images, **settings: Any) -> BatchFeature:
        if not images:
            raise ValueError("images is empty: give at least one image")
        size, resample = settings["size"], settings["resample"]
        crop = settings["crop_size"] if settings.get("do_center_crop") else None
        for name, given in (
            ("size", size if settings["do_resize"] else None),
            ("crop_size", crop),
            ("pad_size", settings.get("pad_size")),
        ):
            check_edges(name, dict(given or {}))
        sized = (size.height and size.width) or (
            crop and size.shortest_edge and not size.longest_edge
        )
        steps = all(settings[name] for name in ("do_resize", "do_rescale", "do_normalize"))
        if not (steps and sized and resample in RESAMPLE) or settings.get("do_pad"):
            return super()._preprocess(images, **settings)
        square = SquareImages(
            (size.height, size.width) if size.height else size.shortest_edge,
            (crop.height, crop.width) if crop else None,
            read_table(settings),
            RESAMPLE[resample],
        )
        pixels = square.pixel_values(
            [torch.from_numpy(image.transpose(1, 2, 0)) for image in images]
        )
        return BatchFeature(
            {"pixel_values": pixels.numpy()}, tensor_type=settings.get("return_tensors")
        )


class SquareImageProcessor(_OneSize, SiglipImageProcessorPil):
    """transformers' SigLIP image processor on this package's image loading: images are resized to
    `size`, without keeping the aspect ratio.
    """

    kind = "SiglipImageProcessor"


class CroppedImageProcessor(_OneSize, CLIPImageProcessorPil):
    """transformers' CLIP image processor on this package's image loading: the shortest edge is
    resized to `size`, then the center `crop_size` is cropped.
    """

    kind = "CLIPImageProcessor"
