"""What stands before a model, without transformers: one class per kind of family, from text and
images to a dict of torch tensors.
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
    """Text and images for a model, called as `preprocessor(prompts, images)`.

    Attributes:
        tokenizer, images: a `TextTokenizer`; what makes tensors of images.
        image_token, image_token_id: the placeholder of an image in a prompt.
        chat_template: a Jinja template, several by name, or None.
        takes_as_is: prompts without placeholders are laid out unless they are said to be finished.
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
        """Return the model's inputs for prompts: rows of one batch, padded on the left.

        Args:
            text: one prompt or more.
            images: of any kind that `load_image` takes: one, a flat list, or one list (or None)
                per prompt.
            as_is: the prompts are a chat template's: where the family's layout would add to a
                prompt without placeholders, it does not.

        Returns:
            input_ids and attention_mask [B, T] int64, with images pixel_values, and what the family
            has beside them.

        Raises:
            ValueError: images and placeholders, or images and prompts, differ in number.
            TypeError, ValueError, FileNotFoundError: an image that `load_image` refuses.
        """
        raise NotImplementedError


class MergedPreprocessor(Preprocessor):
    """SigLIP or CLIP before Llama: placeholders in the text, `image_seq_length` per image.

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
    """Llama-3.2-Vision: a prompt holds `<|image|>` once per image; BOS is put in front, after
    leading `<|image|>`, unless the prompt has it.

    With images it returns what `TiledImages` does but num_tiles, and cross_attention_mask
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
    """PaliGemma: `<image>` * image_seq_length per image, BOS, the prompt, a newline.

    Returns token_type_ids [B, T] int64 of zeros (all of it is the prompt) and pixel_values
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
