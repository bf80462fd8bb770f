"""The processor of older scripts: the package's, with these scripts' constructor, call and tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from mllama.dropin._placeholders import remember
from mllama.processing.meta import fast_tokenizer
from mllama.processing.processor import MllamaBatch, MllamaImageProcessor
from mllama.processing.tokenizer import Tokenizer


class OlderProcessor(MllamaImageProcessor):
    """Prompts and pictures to tensors: `processor([prompt], [picture])`, laid out as image tokens +
    BOS + prompt + newline.

    Attributes:
        IMAGE_TOKEN, image_token_id: the placeholder `<image>` and its id.
        image_seq_length: placeholders per picture.
        image_size: pictures become image_size x image_size pixels.
        tokenizer: of transformers, also where a `Tokenizer` of tiktoken was given.
        pixel_mean, pixel_std: of the normalisation, per channel.
    """

    IMAGE_TOKEN = "<image>"
    pixel_mean: Sequence[float]
    pixel_std: Sequence[float]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | Tokenizer,
        num_image_token: int,
        image_size: int,
        **kwargs,
    ):
        """
        Args:
            tokenizer: it is changed: `<image>`, the 1024 `<loc0000>` ... and the 128 `<seg000>` ...
                are added where they are missing, its habit of adding BOS or EOS is switched off,
                and without a padding token it pads with its end of text. A `Tokenizer` of tiktoken
                stays as it is; a transformers tokenizer of the same ids is made of it.
            num_image_token: placeholders per picture.
            image_size: in pixels.
            kwargs: as the package's processor has them, which `from_pretrained` gives.

        Raises:
            TypeError: no such tokenizer, or a size that is no int.
            ValueError: a size below 1.
        """
        if isinstance(tokenizer, Tokenizer):
            tokenizer = fast_tokenizer(tokenizer)
        own = {"image_mean": self.pixel_mean, "image_std": self.pixel_std, "location_tokens": True}
        super().__init__(tokenizer, num_image_token, image_size, **own | kwargs)
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [self.IMAGE_TOKEN]}, replace_extra_special_tokens=False
        )
        remember(self.image_token_id)  # a model has no other way to know it
        for habit in ("add_bos_token", "add_eos_token"):
            if hasattr(tokenizer, habit):
                setattr(tokenizer, habit, False)

    def __call__(
        self,
        text=None,
        images=None,
        padding: bool | str = "longest",
        truncation: bool | str = True,
        **kwargs,
    ) -> MllamaBatch:
        """Return input_ids and attention_mask [prompts, tokens] int64 and, with pictures,
        pixel_values [pictures, 3, S, S] float32.

        The pixels are also read as "pixel Value" and "pixel_value".

        Args:
            text: a prompt or a list of prompts. Placeholders in it are not doubled: `<image>`
                stands for one picture, and so does a run of as many as a picture has.
            images: pictures of any kind `mllama.processing.image.load_picture` takes: one, a list,
                or one list per prompt.
            padding: of the tokenizer.
            truncation: of the tokenizer, where there is a max_length; without one nothing is cut.
            kwargs: as the package's processor takes them (max_length, return_tensors ...).

        Raises:
            TypeError, ValueError, FileNotFoundError: as `mllama.MllamaImageProcessor`.
        """
        if (
            kwargs.get("max_length") is None
        ):  # the tokenizer would take its own limit, which knows of no pictures
            truncation = False
            kwargs.setdefault("verbose", False)
        return super().__call__(
            self._with_one_each(text), images, padding=padding, truncation=truncation, **kwargs
        )

    def _with_one_each(self, text):
        if isinstance(text, str):
            return text.replace(self.IMAGE_TOKEN * self.image_seq_length, self.IMAGE_TOKEN)
        if isinstance(text, (list, tuple)):
            return [self._with_one_each(item) for item in text]
        return text
