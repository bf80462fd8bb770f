"""The processor of SigLIP + Llama and LLaVA: text and images -> input_ids, attention_mask and
pixel_values. Saved as transformers' LlavaProcessor with a SiglipImageProcessor, or a
CLIPImageProcessor as in LLaVA 1.5.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, Self

from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import AddedToken

from mllama.hf.processors.chat import ChatTemplates
from mllama.hf.processors.folders import load_tokenizer, read_stock_settings, save_aside
from mllama.hf.processors.options import merge_options, on_cpu
from mllama.hf.processors.square import CroppedImageProcessor, SquareImageProcessor, with_channels
from mllama.nn.checks import check_count
from mllama.processing.auto import check_llava, image_kind, image_tokens, read_llava
from mllama.processing.image import channel_values, download_urls
from mllama.processing.prompt import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    LOCATION_TOKENS,
    adds_bos,
    check_whole,
    in_order,
    merge_images,
)

_IMAGE_PROCESSORS = {
    "SiglipImageProcessor": SquareImageProcessor,
    "CLIPImageProcessor": CroppedImageProcessor,
}
_SIZING = (
    "size",
    "do_resize",
    "default_to_square",
    "crop_size",
    "do_center_crop",
    "pad_size",
    "do_pad",
)  # options that may change an image's size


class MllamaImageProcessor(ChatTemplates, ProcessorMixin):
    """Text and images for SigLIP + Llama with merged features, called as `processor([prompt],
    [image])`: text comes first.

    Prompts are completed as follows:

    - Without `<image>`: image tokens (`image_seq_length` per image) + BOS (if the tokenizer has
      one) + prompt + newline. An existing BOS at its start or newline at its end is not repeated.
    - With one `<image>` per image, as `apply_chat_template` writes it: each is expanded in place.
      Nothing is added except the tokenizer's own tokens (some add BOS), unless the text has BOS.

    Attributes: tokenizer, image_processor, chat_template, image_size, image_seq_length
    (placeholders per image; 0 for a model without placeholders, where `<image>` expands to
    nothing), IMAGE_TOKEN (also image_token), image_token_id.

    Args:
        tokenizer: a transformers tokenizer. It is modified: a missing `<image>` is added (the
            vocabulary is then len(processor.tokenizer)), and without a padding token it pads with
            its end-of-text token.
        num_image_token: placeholders per image, `config.text_config.num_image_tokens`:
            (image_size // patch_size) ** 2, or fewer if patches are pooled.
        image_size: images are resized to image_size x image_size pixels.
        image_mean, image_std: of the normalization, per channel.
        image_token: the placeholder.
        location_tokens: also add the 1024 tokens `<loc0000>` ... and the 128 `<seg000>` ...
        chat_template: a Jinja template, or "" for none. Default: the tokenizer's if it handles
            images, else the package's own (`mllama.processing.prompt.CHAT_TEMPLATE`), which writes
            the layout above; with the latter, the tokenizer no longer adds BOS or EOS itself.

    Raises:
        TypeError: tokenizer is not a transformers tokenizer, a size is not an int, or image_token
            is not a str.
        ValueError: a size is below 1, a mean or standard deviation is invalid, or image_token is
            empty.
    """

    takes_as_is = True
    text_kwargs = {"padding": True, "return_tensors": "pt"}
    images_kwargs = {"return_tensors": "pt"}

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_image_token: int,
        image_size: int,
        *,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        image_token: str = IMAGE_TOKEN,
        location_tokens: bool = False,
        chat_template: str | None = None,
    ):
        check_count("num_image_token", num_image_token)
        check_count("image_size", image_size)
        if not isinstance(image_token, str):
            raise TypeError(f"image_token must be a str, got {type(image_token).__name__}")
        if not image_token.strip():
            raise ValueError(f"image_token must be some text, got {image_token!r}")
        mean, std = channel_values("image_mean", image_mean), channel_values("image_std", image_std)
        size = {"height": image_size, "width": image_size}
        image_processor = SquareImageProcessor(
            size=size, image_mean=list(mean), image_std=list(std)
        )
        super().__init__(image_processor, tokenizer, chat_template=chat_template or None)
        if chat_template is None:
            self._choose_template(image_token)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        ids = tokenizer.encode(image_token, add_special_tokens=False)
        if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) != image_token:
            tokenizer.add_tokens(
                [AddedToken(image_token, special=True, normalized=False)], special_tokens=True
            )
        if location_tokens:
            tokenizer.add_tokens([AddedToken(token, normalized=False) for token in LOCATION_TOKENS])
        self.IMAGE_TOKEN = self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_seq_length = num_image_token
        self.image_size = image_size
        self._llava: dict | None = None  # other settings of a folder, written back unchanged

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    @on_cpu
    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        videos: None = None,
        audio: None = None,
        *,
        as_is: bool = False,
        allow_urls: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode prompts: input_ids and attention_mask [prompts, tokens] int64 and, with images,
        pixel_values [images, 3, S, S] float32.

        Args:
            text: a prompt or a list of prompts; None for images alone. Text and images are
                exchanged if they were clearly given in transformers' order, images first.
            images: in any form that `load_image` accepts: one, a flat list, or one list (or None)
                per prompt. From a flat list, placeholders take images in order; without
                placeholders, one prompt takes all and several take one each.
            as_is: add nothing to a prompt, even without placeholders. Set by
                `apply_chat_template`.
            allow_urls: download images given as http(s) URLs.
            kwargs: options of the tokenizer and the image processor. Default: padding=True (to the
                longest) and return_tensors="pt".

        Raises:
            TypeError: text is not text, an image is not an image, there are videos or audio, or an
                option is unknown.
            ValueError: the numbers of images and placeholders differ (the message has both),
                truncation cuts an image's placeholders, an image is rejected
                (`mllama.processing.image.load_image`), or an option's value is
                (`mllama.hf.processors.options`).
            FileNotFoundError: an image file does not exist.
        """
        text, images = in_order(text, images, videos, audio)
        images = download_urls(images, allow_urls)
        kwargs = with_channels(kwargs)
        if isinstance(kwargs.get("images_kwargs"), dict):
            kwargs["images_kwargs"] = with_channels(kwargs["images_kwargs"])
        merged = merge_options(self, kwargs)
        if text is None:
            return BatchFeature(self.image_processor(images, **merged["images_kwargs"]))
        prompts, offsets, rows, special = merge_images(
            [text] if isinstance(text, str) else list(text),
            images,
            self.tokenizer,
            self.image_token,
            self.image_seq_length,
            as_is,
            self._expand,
        )
        text_kwargs = {"return_token_type_ids": False, **merged["text_kwargs"]}
        text_kwargs["add_special_tokens"] = special and text_kwargs.get("add_special_tokens", True)
        data = dict(self.tokenizer(prompts, **text_kwargs))
        check_whole(
            data["input_ids"],
            self.image_token_id,
            [self.image_seq_length * len(row) for row in rows],
        )
        if merged["return_text_replacement_offsets"]:
            data["text_replacement_offsets"] = offsets
        if merged["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if any(rows):
            data.update(self.image_processor(rows, **merged["images_kwargs"]))
            wanted, got = sum(len(row) for row in rows), len(data["pixel_values"])
            if wanted != got:
                raise ValueError(f"the prompts hold {wanted} image(s), but pixel_values {got}")
            self._check_size(data["pixel_values"], kwargs)
        return BatchFeature(
            data,
            tensor_type=text_kwargs.get("return_tensors"),
            skip_tensor_conversion=["text_replacement_offsets"],
        )

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """As in `ChatTemplates`; nothing is added to the template's output.

        http(s) URLs in the messages are downloaded only with `processor_kwargs={"allow_urls":
        True}`.
        """
        kwargs["processor_kwargs"] = {"as_is": True, **(kwargs.get("processor_kwargs") or {})}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Self:
        """Load a LlavaProcessor with a SiglipImageProcessor or CLIPImageProcessor from a folder or
        hub id.

        Args:
            kwargs: options of transformers' loading (revision, subfolder, local_files_only ...).

        Raises:
            OSError: the files do not exist.
            ValueError: the processor is another family's, which the message names, or its images
                are not square.
        """
        where = pretrained_model_name_or_path
        settings, image_settings = read_stock_settings(where, **kwargs)
        check_llava(where, settings, image_settings)
        kind = image_kind(where, image_settings, list(_IMAGE_PROCESSORS))
        image_processor = _IMAGE_PROCESSORS[kind].from_dict(image_settings)
        size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
        llava = read_llava(where, settings, (size.height, size.width))
        tokenizer = load_tokenizer(where, **kwargs)
        placeholders = image_tokens(size.height, **llava)
        processor = cls(
            tokenizer,
            placeholders or 1,
            size.height,
            image_token=settings.get("image_token", IMAGE_TOKEN),
            chat_template=settings.get("chat_template") or tokenizer.chat_template or "",
        )
        processor.image_processor, processor.image_seq_length = image_processor, placeholders
        processor._llava = llava
        return processor

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write processor_config.json, the tokenizer's files and chat_template.jinja; return their
        paths.

        Stock AutoProcessor can load the folder, and returns the same ids and pixel_values for the
        chat template's output. Each file is written atomically.
        """
        return save_aside(self._as_llava(), save_directory, push_to_hub, **kwargs)

    def to_dict(self) -> dict:
        """The content of processor_config.json: a LlavaProcessor."""
        return self._as_llava().to_dict()

    def _as_llava(self):
        from transformers.models.llava.processing_llava import LlavaProcessor

        llava = self._llava
        if llava is None:
            side = math.isqrt(self.image_seq_length)
            patch = self.image_size // max(side, 1)
            if (
                side == 0
                or side**2 != self.image_seq_length
                or patch == 0
                or self.image_size // patch != side
            ):
                patch = (
                    self.image_size
                )  # one patch and additional tokens: this form allows any number
            more = self.image_seq_length - (self.image_size // patch) ** 2
            llava = {
                "patch_size": patch,
                "vision_feature_select_strategy": "full",
                "num_additional_image_tokens": more,
            }
        return LlavaProcessor(
            self.image_processor,
            self.tokenizer,
            image_token=self.image_token,
            chat_template=self.chat_template,
            **llava,
        )

    def _expand(self, prompt: str) -> tuple[str, list[dict]]:
        """`expand_images` by transformers, which also finds plain-text placeholders."""
        image = self.image_token * self.image_seq_length
        images = [image] * prompt.count(self.image_token)
        texts, offsets = self.get_text_with_replacements([prompt], images)
        return texts[0], offsets[0]

    def _check_size(self, pixel_values, options: dict) -> None:
        """Reject options that change the size of images, and so the number of placeholders."""
        sizes = {tuple(image.shape[-2:]) for image in pixel_values}
        if sizes != {(self.image_size, self.image_size)}:
            given = {**options, **(options.get("images_kwargs") or {})}
            names = ", ".join(name for name in _SIZING if name in given) or "size"
            raise ValueError(
                f"{names} is not supported with a text: its {self.image_seq_length} placeholders "
                f"per image stand for {self.image_size} x"
                f" {self.image_size} pixels, got "
                f"{' and '.join(f'{high} x {wide}' for high, wide in sorted(sizes))}"
            )

    def _choose_template(self, image_token: str) -> None:
        theirs = self.tokenizer.chat_template
        if isinstance(theirs, str) and "image" in theirs:
            self.chat_template = theirs
            return
        self.chat_template = CHAT_TEMPLATE.replace(IMAGE_TOKEN, image_token)
        if adds_bos(self.tokenizer) or getattr(self.tokenizer, "add_eos_token", False):
            self.tokenizer.add_bos_token = self.tokenizer.add_eos_token = False
