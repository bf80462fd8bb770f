"""PaliGemma's processor: transformers', with this package's image loading and C++ resize."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.paligemma import processing_paligemma as stock

from mllama.hf.processors.chat import ChatTemplates
from mllama.hf.processors.folders import StockFiles
from mllama.hf.processors.options import TEXT, check_rows, merge_options, on_cpu
from mllama.hf.processors.square import SquareImageProcessor
from mllama.processing.image import download_urls
from mllama.processing.prompt import (
    MAX_IMAGE_TOKENS,
    check_whole,
    in_order,
    lay_out_prefix,
    share_out,
)

_REFUSED = {
    **TEXT,
    "add_special_tokens": (lambda value: not value, "the layout has BOS, and the suffix EOS"),
    "return_token_type_ids": (
        lambda value: value is not False,
        "they tell the model where the suffix begins",
    ),
    **dict.fromkeys(
        ("text_pair", "text_target", "text_pair_target"),
        (lambda value: value is None, "give it as suffix"),
    ),
}


# misc: from_pretrained has the hub's options in kwargs
class PaliGemmaProcessor(ChatTemplates, StockFiles, stock.PaliGemmaProcessor):  # type: ignore[misc]
    """Text and images for PaliGemma, called as `processor(images=..., text=..., suffix=...)`.

    A prompt becomes `<image>` * image_seq_length for each image + BOS + prompt + newline. A prompt
    that contains `<image>` keeps its order, with BOS after the last one. Unlike transformers'
    PaliGemmaProcessor, prompts with and without images may be mixed; BOS, newline and the suffix's
    end token are not repeated; labels are returned only with a suffix; and images may be in any
    form that `load_image` accepts.

    Args:
        image_processor: a `SquareImageProcessor` with an image_seq_length (tokens per image), or
            a SiglipImageProcessor of transformers, which is converted.
        tokenizer: a transformers tokenizer. It is modified as in transformers: missing `<image>`,
            `<loc0000>` ... (1024) and `<seg000>` ... (128) are added, and it no longer adds BOS or
            EOS.
        chat_template: a Jinja template; released models have none.

    Raises:
        ValueError: image_processor is of another class, or has no valid image_seq_length.
    """

    stock_class, image_class = stock.PaliGemmaProcessor, SquareImageProcessor

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
    ):
        image_processor = self.as_own(image_processor)
        tokens = getattr(image_processor, "image_seq_length", None)
        if not isinstance(tokens, int) or not 1 <= tokens <= MAX_IMAGE_TOKENS:
            raise ValueError(f"image_seq_length must be in 1..{MAX_IMAGE_TOKENS}, got {tokens!r}")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @on_cpu
    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        suffix: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        allow_urls: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode prompts: input_ids, attention_mask, token_type_ids [B, T] (1 for the suffix) and
        pixel_values [images, 3, S, S].

        With a suffix also labels [B, T]: the ids of the suffix and its end token, -100 elsewhere.

        Args:
            images: in any form that `load_image` accepts: one, a flat list, or one list (or None)
                per prompt. From a flat list, placeholders take images in order; without
                placeholders, one prompt takes all and several take one each.
            text: a prompt or a list of prompts.
            suffix: the answers to train, one per prompt; EOS is appended.
            allow_urls: download images given as http(s) URLs.
            kwargs: options of the tokenizer and the image processor (padding, return_tensors ...).

        Raises:
            TypeError: text or suffix is not text, an image is not an image, there are videos or
                audio, or an option is unknown.
            ValueError: an option's value is not supported; rows have unequal lengths without
                padding; the numbers of images and placeholders, or of prompts and suffixes,
                differ; truncation cuts an image's placeholders; `load_image` rejects an image.
        """
        text, images = in_order(text, images, videos, audio)
        images = download_urls(images, allow_urls)
        merged = merge_options(self, kwargs, _REFUSED)
        if text is None:
            return BatchFeature(self.image_processor(images, **merged["images_kwargs"]))
        prompts = [text] if isinstance(text, str) else list(text)
        if not prompts:
            raise ValueError("text is an empty list: give at least one prompt")
        if merged["return_text_replacement_offsets"]:
            raise ValueError(
                "return_text_replacement_offsets, used to mark answers in a conversation, is not "
                "supported: give the answer as suffix"
            )
        rows = share_out(
            images, [prompt.count(self.image_token) or None for prompt in prompts], self.image_token
        )
        text_kwargs = {
            **merged["text_kwargs"],
            "return_token_type_ids": True,
            "add_special_tokens": False,
        }
        tensors = text_kwargs.pop("return_tensors", None)
        if suffix is not None:
            text_kwargs["text_pair"] = self._suffixes(suffix, len(prompts))
        bos, count = self.tokenizer.bos_token, self.image_seq_length
        texts = [
            lay_out_prefix(prompt, len(row), self.image_token, count, bos)
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        data = dict(self.tokenizer(texts, **text_kwargs))
        check_rows(data["input_ids"], tensors)
        check_whole(
            data["input_ids"],
            self.image_token_id,
            [self.image_seq_length * len(row) for row in rows],
        )
        if merged["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if suffix is not None:
            pairs = zip(data["input_ids"], data["token_type_ids"], strict=True)
            data["labels"] = [
                [token if kind else -100 for token, kind in zip(*pair, strict=True)]
                for pair in pairs
            ]
        if any(rows):
            data.update(self.image_processor(rows, **merged["images_kwargs"]))
        return BatchFeature(data, tensor_type=tensors)

    def _suffixes(self, suffix: str | Sequence[str], prompts: int) -> list[str]:
        suffixes = [suffix] if isinstance(suffix, str) else suffix
        if not isinstance(suffixes, (list, tuple)) or not all(
            isinstance(item, str) for item in suffixes
        ):
            raise TypeError(f"suffix must be a str or a list of them, got {suffix!r:.60}")
        if len(suffixes) != prompts:
            raise ValueError(f"{len(suffixes)} suffix(es) for {prompts} prompt(s)")
        if any(self.image_token in item for item in suffixes):
            raise ValueError(
                f"suffix must not hold {self.image_token}: images stand before what is learnt"
            )
        return [
            item.removesuffix(self.tokenizer.eos_token) + self.tokenizer.eos_token
            for item in suffixes
        ]
