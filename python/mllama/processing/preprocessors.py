"""Preprocessors without transformers: text and images -> a dict of torch tensors. One class per
kind of family.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mllama.processing.prompt import (
    LOCATION_TOKENS,
    MAX_IMAGE_TOKENS,
    adds_bos,
    check_whole,
    lay_out_prefix,
    merge_images,
    put_bos,
    share_out,
    share_out_rows,
)
from mllama.processing.square import SquareImages
from mllama.processing.text_tokenizer import TextTokenizer
from mllama.processing.tiled import TiledImages, cross_attention_mask


class Preprocessor:
    """Encodes text and images for a model: `preprocessor(prompts, images)`.

    Attributes:
        tokenizer: a `TextTokenizer`.
        images: converts images to tensors.
        image_token, image_token_id: the placeholder of an image in a prompt.
        chat_template: a Jinja template, several by name, or None.
        takes_as_is: whether `as_is` has an effect: prompts without placeholders are laid out
            unless it is set.
    """

    takes_as_is = False

    def __init__(
        self,
        tokenizer: TextTokenizer,
        images: SquareImages | TiledImages,
        image_token: str,
        chat_template: str | Mapping[str, str] | None = None,
    ):
        self.tokenizer, self.images = tokenizer, images
        self.image_token, self.chat_template = image_token, chat_template
        self.image_token_id = tokenizer.token_id(image_token)

    def __call__(
        self, text: Sequence[str], images: Any = None, as_is: bool = False
    ) -> dict[str, torch.Tensor]:
        """Encode prompts as a batch, padded on the left.

        Args:
            text: one prompt or a list.
            images: in any form that `load_image` accepts: one, a flat list, or one list (or None)
                per prompt.
            as_is: the prompts come from a chat template: add nothing to prompts without
                placeholders.

        Returns:
            input_ids and attention_mask [B, T] int64; pixel_values if there are images; and the
            family's other tensors.

        Raises:
            ValueError: the numbers of images and placeholders, or of images and prompts, differ.
            TypeError, ValueError, FileNotFoundError: `load_image` rejects an image.
        """
        raise NotImplementedError


class MergedPreprocessor(Preprocessor):
    """For SigLIP or CLIP with Llama: `image_seq_length` placeholders per image.

    Returns pixel_values [images, 3, height, width] float32.
    """

    takes_as_is = True

    def __init__(
        self,
        tokenizer: TextTokenizer,
        images: SquareImages,
        image_token: str,
        image_seq_length: int,
        chat_template: str | Mapping[str, str] | None = None,
    ):
        tokenizer.add_special_tokens([image_token])
        super().__init__(tokenizer, images, image_token, chat_template)
        self.image_seq_length = image_seq_length

    def __call__(
        self, text: Sequence[str], images: Any = None, as_is: bool = False
    ) -> dict[str, torch.Tensor]:
        texts, _, rows, special = merge_images(
            list(text), images, self.tokenizer, self.image_token, self.image_seq_length, as_is
        )
        ids = [self.tokenizer.encode(prompt, add_special_tokens=special) for prompt in texts]
        check_whole(ids, self.image_token_id, [self.image_seq_length * len(row) for row in rows])
        batch = self.tokenizer.pad(ids, pad_token_id=_pad_or_end(self.tokenizer))
        flat = [image for row in rows for image in row]
        return batch | (self.images(flat) if flat else {})


def _pad_or_end(tokenizer: TextTokenizer) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token is None else None


class TiledPreprocessor(Preprocessor):
    """For Llama-3.2-Vision. A prompt has one `<|image|>` per image; BOS is added after leading
    `<|image|>` unless the prompt has it.

    Returns the tensors of `TiledImages` except num_tiles, and cross_attention_mask
    [B, T, N, max_image_tiles] int64.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        images: TiledImages,
        chat_template: str | Mapping[str, str] | None = None,
    ):
        token = tokenizer.special_tokens_map.get("image_token", "<|image|>")
        super().__init__(tokenizer, images, token, chat_template)
        if self.image_token_id is None:
            raise ValueError(f"the tokenizer has no token {self.image_token}")

    def __call__(
        self, text: Sequence[str], images: Any = None, as_is: bool = False
    ) -> dict[str, torch.Tensor]:
        rows, texts, special = share_out_rows(text, images, self.image_token), list(text), True
        if (bos := self.tokenizer.bos_token) is not None:
            texts = [put_bos(prompt, bos, self.image_token) for prompt in texts]
            special = not adds_bos(self.tokenizer)
        ids = [self.tokenizer.encode(prompt, add_special_tokens=special) for prompt in texts]
        check_whole(ids, self.image_token_id, [len(row) for row in rows])
        batch = self.tokenizer.pad(ids)
        if any(rows):
            tiles = self.images(rows)
            batch["cross_attention_mask"] = cross_attention_mask(
                batch["input_ids"].tolist(),
                self.image_token_id,
                tiles.pop("num_tiles"),
                self.images.max_image_tiles,
            )
            batch |= tiles
        return batch


class PaliGemmaPreprocessor(Preprocessor):
    """For PaliGemma: `<image>` * image_seq_length per image, BOS, the prompt, a newline.

    Returns token_type_ids [B, T] int64 of zeros (all tokens are the prompt) and pixel_values
    [images, 3, height, width] float32.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        images: SquareImages,
        image_seq_length: int | None,
        chat_template: str | Mapping[str, str] | None = None,
    ):
        if not isinstance(image_seq_length, int) or not 1 <= image_seq_length <= MAX_IMAGE_TOKENS:
            raise ValueError(
                f"image_seq_length must be in 1..{MAX_IMAGE_TOKENS}, got {image_seq_length!r}"
            )
        token = tokenizer.special_tokens_map.get("image_token", "<image>")
        tokenizer.add_special_tokens([token])
        tokenizer.backend.add_tokens(list(LOCATION_TOKENS))
        super().__init__(tokenizer, images, token, chat_template)
        self.image_seq_length = image_seq_length

    def __call__(
        self, text: Sequence[str], images: Any = None, as_is: bool = False
    ) -> dict[str, torch.Tensor]:
        token, count = self.image_token, self.image_seq_length
        rows = share_out(images, [prompt.count(token) or None for prompt in text], token)
        texts = [
            lay_out_prefix(prompt, len(row), token, count, self.tokenizer.bos_token)
            for prompt, row in zip(text, rows, strict=True)
        ]
        ids = [self.tokenizer.encode(prompt, add_special_tokens=False) for prompt in texts]
        check_whole(ids, self.image_token_id, [count * len(row) for row in rows])
        batch = self.tokenizer.pad(ids)
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        flat = [image for row in rows for image in row]
        return batch | (self.images(flat) if flat else {})
