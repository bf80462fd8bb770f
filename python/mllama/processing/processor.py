"""The processor: text and pictures in, input_ids, attention_mask and pixel_values out. On disk it is HF's LlavaProcessor with a SigLIP image processor."""

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import AddedToken

from mllama.ops.image import resize_normalize
from mllama.processing.image import load_pixels, normalisation_table
from mllama.processing.prompt import CHAT_TEMPLATE, IMAGE_TOKEN, LOCATION_TOKENS, lay_out, share_out

_RESAMPLE = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
_OLDER_KEYS = {"pixel Value": "pixel_values", "pixel_value": "pixel_values"}


class MllamaBatch(BatchFeature):
    """A BatchFeature whose pixel_values are also answered under the older keys "pixel Value" and "pixel_value", which it never lists."""

    def __getitem__(self, key):
        return super().__getitem__(_OLDER_KEYS.get(key, key))

    def __contains__(self, key):
        return super().__contains__(_OLDER_KEYS.get(key, key))

    def get(self, key, default=None):
        return self[key] if key in self else default


class SquareImageProcessor(SiglipImageProcessorPil):
    """HF's SigLIP image processor with this package's picture loading and C++ resize; pixel_values are bit-equal for upright 8-bit pictures.

    Takes what `mllama.processing.image.load_picture` takes, singly or in flat or nested lists, and returns [pictures, 3, height, width] float32.
    It is saved, and loaded by stock transformers, as a SiglipImageProcessor.
    """

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        flat = [images] if not isinstance(images, (list, tuple)) else images
        flat = [image for row in flat for image in (row if isinstance(row, (list, tuple)) else [row])]
        return [image for item in flat for image in (item if getattr(item, "ndim", 3) == 4 else [item])]

    def process_image(self, image, **kwargs) -> np.ndarray:
        return np.moveaxis(load_pixels(image).numpy(), -1, 0)

    def _preprocess(self, images, do_resize, size, resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std, **kwargs):
        plain = do_resize and do_rescale and do_normalize and size.height and size.width and resample in _RESAMPLE
        if not plain or kwargs.get("do_center_crop") or kwargs.get("do_pad"):
            return super()._preprocess(
                images,
                do_resize=do_resize,
                size=size,
                resample=resample,
                do_rescale=do_rescale,
                rescale_factor=rescale_factor,
                do_normalize=do_normalize,
                image_mean=image_mean,
                image_std=image_std,
                **kwargs,
            )
        table = normalisation_table(_three(image_mean), _three(image_std), rescale_factor)
        pixels = [
            resize_normalize(torch.from_numpy(image.transpose(1, 2, 0)), size.height, size.width, table, _RESAMPLE[resample]) for image in images
        ]
        data = {"pixel_values": torch.stack(pixels)}
        if kwargs.get("return_tensors") != "pt":
            data = {"pixel_values": data["pixel_values"].numpy()}
        return BatchFeature(data)

    def to_dict(self) -> dict:
        return {**super().to_dict(), "image_processor_type": "SiglipImageProcessor"}


class MllamaImageProcessor(ProcessorMixin):
    """Text and pictures for SigLIP + Llama early fusion.

    Called `processor([prompt], [image])`, in the order text, images, or by keywords. Attributes: tokenizer, image_processor, image_size,
    image_seq_length (placeholders per picture), IMAGE_TOKEN, image_token_id, chat_template.

    What becomes of a prompt:

    - It holds no `<image>`: image tokens (image_seq_length per picture) + BOS (if the tokenizer has one) + prompt + newline. BOS and newline are
      not doubled where the prompt has them.
    - It holds `<image>` (once per picture, as `apply_chat_template` writes it): each is expanded in place and nothing else is added, except
      what the tokenizer itself adds to every text (some put BOS in front), and that not where the text has BOS already.
    """

    text_kwargs = {"padding": True, "return_tensors": "pt"}
    images_kwargs = {"return_tensors": "pt"}

    def __init__(
        self,
        tokenizer,
        num_image_token: int,
        image_size: int,
        *,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        image_token: str = IMAGE_TOKEN,
        location_tokens: bool = False,
        chat_template: str | None = None,
    ):
        """Args:
            tokenizer: a transformers tokenizer. `<image>` is added to it when it lacks it, and where it has no padding token it pads with its
                end-of-text token.
            num_image_token: placeholders per picture, (image_size // patch_size) ** 2.
            image_size: pictures become image_size x image_size pixels.
            image_mean, image_std: of the normalisation, per channel.
            image_token: the placeholder.
            location_tokens: add 1024 `<locNNNN>` and 128 `<segNNN>` tokens too.
            chat_template: a Jinja template; None takes the tokenizer's if that knows of images, else this package's own, which gives the
                layout above. With the package's own the tokenizer's habit of adding BOS or EOS by itself is switched off.

        Raises:
            TypeError, ValueError: an argument of another type, or a size below 1.
        """
        for name, value in (("num_image_token", num_image_token), ("image_size", image_size)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        image_processor = SquareImageProcessor(
            size={"height": image_size, "width": image_size}, image_mean=list(image_mean), image_std=list(image_std)
        )
        normalisation_table(_three(image_mean), _three(image_std))  # refuses what cannot be a mean and a deviation
        theirs = getattr(tokenizer, "chat_template", None)
        own = chat_template is None and not (isinstance(theirs, str) and "image" in theirs)
        if own:
            chat_template = CHAT_TEMPLATE.replace(IMAGE_TOKEN, image_token)
        super().__init__(image_processor, tokenizer, chat_template=(theirs if chat_template is None else chat_template) or None)
        if own and (getattr(tokenizer, "add_bos_token", False) or getattr(tokenizer, "add_eos_token", False) or self._adds_bos()):
            tokenizer.add_bos_token = tokenizer.add_eos_token = False
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokens = tokenizer.encode(image_token, add_special_tokens=False)
        if len(tokens) != 1 or tokenizer.convert_ids_to_tokens(tokens[0]) != image_token:
            tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
        if location_tokens:
            tokenizer.add_tokens(list(LOCATION_TOKENS))
        self.IMAGE_TOKEN = self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_seq_length = num_image_token
        self.image_size = image_size
        self._llava: dict | None = None  # what a folder said beyond image_seq_length and image_size, written back as it was

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def __call__(self, text=None, images=None, videos=None, audio=None, *, as_is: bool = False, **kwargs) -> MllamaBatch:
        """Return input_ids and attention_mask [prompts, tokens] int64 and, where there are pictures, pixel_values [pictures, 3, S, S] float32.

        Args:
            text: a prompt or a list of prompts; None for pictures alone.
            images: what `load_picture` takes: one picture, a flat list, or one list (or None) per prompt. A flat list goes to the placeholders in
                order; without placeholders to the one prompt, or to several prompts one by one.
            as_is: add nothing to the prompts, as if each held a placeholder. `apply_chat_template` sets it.
            kwargs: of the tokenizer and image processor, as in transformers. padding defaults to True (the longest), return_tensors to "pt".

        Raises:
            TypeError: arguments of another type, or videos or audio.
            ValueError: pictures and placeholders differ in number (the text counts both), truncation cut into a picture's placeholders, or a
                picture is refused (`mllama.processing.image.load_picture`).
        """
        if videos is not None or audio is not None:
            raise TypeError("MllamaImageProcessor takes text and images, no videos and no audio")
        text, images = _in_order(text, images)
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        data, skip = {}, ["text_replacement_offsets"]
        if text is None:
            pictures = [image for row in share_out(images, [0]) for image in row]
        else:
            prompts, offsets, pictures, special = self._prompts(text, images, as_is)
            for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
                text_kwargs.pop(name, None)
            text_kwargs.setdefault("add_special_tokens", special)
            text_kwargs.setdefault("return_token_type_ids", False)
            data.update(self.tokenizer(prompts, **text_kwargs))
            self._check_not_cut(prompts, data["input_ids"])
            if merged["return_text_replacement_offsets"]:
                data["text_replacement_offsets"] = offsets
            if merged["return_mm_token_type_ids"]:
                data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if pictures:
            data.update(self.image_processor(pictures, **images_kwargs))
        return MllamaBatch(data, tensor_type=text_kwargs.get("return_tensors"), skip_tensor_conversion=skip)

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """As ProcessorMixin's: messages to text, or with tokenize=True, return_dict=True to a batch; pictures may stand in the messages.

        A part {"type": "image", "image": picture} takes what `load_picture` takes ("path" and "url" name files; nothing is downloaded).
        """
        kwargs["processor_kwargs"] = {"as_is": True, **(kwargs.get("processor_kwargs") or {})}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "MllamaImageProcessor":
        """Read any folder (or hub id) of a LlavaProcessor with a SiglipImageProcessor, as `save_pretrained` writes it.

        Args:
            kwargs: of transformers' loading (revision, subfolder, local_files_only ...).

        Raises:
            OSError: nothing there.
            ValueError: another family's processor, named in the text; or one whose pictures are not square.
        """
        from transformers import AutoTokenizer

        where = pretrained_model_name_or_path
        settings, _ = cls.get_processor_dict(where, **kwargs)
        images, _ = SquareImageProcessor.get_image_processor_dict(where, **kwargs)
        for kind, ours in ((settings.get("processor_class"), "LlavaProcessor"), (images.get("image_processor_type"), "SiglipImageProcessor")):
            if kind is not None and kind.removesuffix("Fast").removesuffix("Pil") != ours:
                raise ValueError(f"{where} holds a {kind}; MllamaImageProcessor reads a LlavaProcessor with a SiglipImageProcessor")
        image_processor = SquareImageProcessor.from_dict(images)
        size, patch = image_processor.size, settings.get("patch_size")
        if not size.height or size.height != size.width or not isinstance(patch, int) or not 1 <= patch <= size.height:
            raise ValueError(f"{where}: expected pictures of a square size and a patch_size within it, got size {dict(size)}, patch_size {patch}")
        strategy, extra = settings.get("vision_feature_select_strategy", "full"), settings.get("num_additional_image_tokens", 0)
        tokenizer = AutoTokenizer.from_pretrained(where, **kwargs)
        processor = cls(
            tokenizer,
            (size.height // patch) ** 2 + extra - (strategy == "default"),
            size.height,
            image_mean=image_processor.image_mean,
            image_std=image_processor.image_std,
            image_token=settings.get("image_token", IMAGE_TOKEN),
            chat_template=settings.get("chat_template") or tokenizer.chat_template or "",
        )
        processor.image_processor = image_processor
        processor._llava = {"patch_size": patch, "vision_feature_select_strategy": strategy, "num_additional_image_tokens": extra}
        return processor

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Write a LlavaProcessor with a SiglipImageProcessor: processor_config.json, the tokenizer's files, chat_template.jinja.

        Each file is written aside and renamed. Stock AutoProcessor reads the folder and gives the same ids and pixel_values for prompts written by
        the chat template.

        Raises:
            ValueError: num_image_token is no square number of patches of the image size, which this format cannot say.
        """
        llava = self._as_llava()
        if push_to_hub:
            return llava.save_pretrained(save_directory, push_to_hub=True, **kwargs)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        with tempfile.TemporaryDirectory(prefix=".processor-", dir=folder) as aside:
            llava.save_pretrained(aside, **kwargs)
            for file in sorted(path for path in Path(aside).rglob("*") if path.is_file()):
                target = folder / file.relative_to(aside)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
                written.append(str(target))
        return written

    def to_dict(self) -> dict:
        """What processor_config.json says: a LlavaProcessor."""
        return self._as_llava().to_dict()

    def _as_llava(self):
        from transformers.models.llava.processing_llava import LlavaProcessor

        side = math.isqrt(self.image_seq_length)
        patch = self.image_size // side
        if self._llava is None and (side**2 != self.image_seq_length or patch == 0 or self.image_size // patch != side):
            raise ValueError(f"{self.image_seq_length} image tokens are no square grid of patches of {self.image_size} pixels: no LLaVA processor says that")
        llava = self._llava or {"patch_size": patch, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
        return LlavaProcessor(self.image_processor, self.tokenizer, image_token=self.image_token, chat_template=self.chat_template, **llava)

    def _adds_bos(self) -> bool:
        """True when the tokenizer puts BOS in front of every text by itself."""
        return self.tokenizer.bos_token is not None and self.tokenizer.bos_token_id in self.tokenizer("")["input_ids"]

    def _prompts(self, text, images, as_is: bool) -> tuple[list[str], list, list, bool]:
        """The prompts with their placeholders, where those went, all pictures in order, and whether the tokenizer may add its own tokens."""
        prompts = [text] if isinstance(text, str) else list(text)
        if not prompts:
            raise ValueError("text is an empty list: give at least one prompt")
        run, bos = self.image_token * self.image_seq_length, self.tokenizer.bos_token
        expanded, offsets = self.get_text_with_replacements(list(prompts), [run] * sum(prompt.count(self.image_token) for prompt in prompts))
        rows = share_out(images, [len(row) for row in offsets], self.image_token)
        written = [as_is or bool(row) for row in offsets]
        for number, (row, places) in enumerate(zip(rows, offsets, strict=True)):
            if as_is and len(row) != len(places):
                raise ValueError(f"prompt {number} holds {len(places)} {self.image_token} placeholder(s), but {len(row)} picture(s) were given for it")
        special = all(written) and not any(bos and bos in prompt for prompt in expanded)
        lead = bos if not special and self._adds_bos() else ""
        for number, prompt in enumerate(expanded):
            if not written[number]:
                expanded[number] = lay_out(prompt, self.image_seq_length * len(rows[number]), self.image_token, bos)
            elif lead and lead not in prompt:
                expanded[number] = lead + prompt
        return expanded, offsets, [picture for row in rows for picture in row], special

    def _check_not_cut(self, prompts: list[str], input_ids) -> None:
        for number, (prompt, ids) in enumerate(zip(prompts, input_ids, strict=False)):
            wanted, kept = prompt.count(self.image_token), sum(int(token) == self.image_token_id for token in ids)
            if wanted != kept:
                raise ValueError(
                    f"prompt {number} has {wanted} image tokens, but {kept} are left in input_ids: truncation cut into a picture; raise max_length"
                )


def _three(values) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, Sequence) else (values,) * 3


def _is_text(value) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(item, str) for item in value))


def _is_pictures(value) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(item is None or _is_text(item) or _is_pictures(item) for item in value)
    return isinstance(value, (Image.Image, np.ndarray, torch.Tensor, os.PathLike))


def _in_order(text, images):
    """(text, images), exchanged where they were plainly given in transformers' order images, text."""
    if text is None and images is None:
        raise ValueError("give text, images, or both")
    if text is None or _is_text(text) or text == []:
        return text, images
    if _is_pictures(text) and (images is None or _is_text(images)):
        return images, text
    raise TypeError(f"text must be a prompt or a list of prompts, got {type(text).__name__}; the order is processor(text, images)")
