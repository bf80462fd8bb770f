"""`fuse` with a processor: two loaded models put together, and what stands before the one that they
become.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mllama.hf import fusing
from mllama.hf.configs import MllamaConfig
from mllama.hf.modeling import MllamaForConditionalGeneration
from mllama.hf.processors.auto import load_processor
from mllama.hf.processors.llava import MllamaImageProcessor
from mllama.hf.processors.square import SquareImageProcessor
from mllama.hf.siglip import SiglipModel
from mllama.processing.prompt import IMAGE_TOKEN


def fuse(
    text_model: MllamaForConditionalGeneration,
    vision_model: SiglipModel,
    fusion: str = "merge",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> MllamaForConditionalGeneration:
    """One model of two. It shares their parameters: nothing is copied, and what is trained in one
    is trained in the other.

    What stands between them (a projector, a learned pooling, cross-attention layers) is new and
    random, save that gates are zero: with fusion="cross_attention" the logits are the text model's,
    bit for bit, until something is trained.

    The model's `processor` is made of the tokenizer (and chat template) of the text model's folder
    and the image settings of the vision model's, and saved with it, so that `mllama.load` reads the
    folder. It is None where there is no tokenizer.

    Args:
        text_model: a Llama, as `MllamaForConditionalGeneration.from_pretrained` reads it from a
            folder or a GGUF file.
        vision_model: as `SiglipModel.from_pretrained` reads it. A pooling head is left out.
        fusion: "merge", "prepend" or "cross_attention", as `MllamaConfig` has it.
        tokenizer: in place of the one in the text model's folder; it is copied.
        options: further arguments of `MllamaConfig`: `image_token_index` (with "merge" by default
            that of `<image>` in the tokenizer, which is added where it is missing), `projector`,
            `num_image_tokens`, `cross_attention_every` ...

    Returns:
        A `siglip_llama`, in the text model's dtype, on its device, and in training or eval mode as
        it is.

    Raises:
        TypeError: models of another kind, a tokenizer or an option that is none.
        ValueError: a text model that is no Llama, models of two dtypes or on two devices, options
            that cannot be.
    """
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}"
        )
    tokenizer = (
        copy.deepcopy(tokenizer)
        if tokenizer is not None
        else _found(text_model, PreTrainedTokenizerBase)
    )
    if tokenizer is not None and fusion == "merge" and options.get("image_token_index") is None:
        options["image_token_index"] = tokenizer.get_vocab().get(IMAGE_TOKEN, len(tokenizer))
    model = fusing.fuse(text_model, vision_model, fusion, **options)
    if tokenizer is not None:
        model.processor = _processor(
            model.config, tokenizer, _found(vision_model, SquareImageProcessor)
        )
    return model


def _found(model: Any, kind: type) -> Any:
    """What stands in the folder that a model was read from, where it is of a kind; else None."""
    where = getattr(getattr(model, "config", None), "name_or_path", "")
    if not where or not Path(where).exists():
        return None
    try:
        found = load_processor(where)
    except FileNotFoundError:
        return None
    return found if isinstance(found, kind) else None


def _processor(
    config: MllamaConfig, tokenizer: PreTrainedTokenizerBase, images: SquareImageProcessor | None
) -> MllamaImageProcessor | None:
    """A processor that writes as many placeholders for an image as the fusion has, which may be
    none.
    """
    token, place = IMAGE_TOKEN, config.image_token_index
    if place is not None and place < len(tokenizer):
        token = tokenizer.convert_ids_to_tokens(place)
        if token not in tokenizer.get_added_vocab():
            warnings.warn(
                f"no processor is made: image_token_index {place} is the ordinary token {token!r}; "
                "give a special one",
                stacklevel=3,
            )
            return None
    elif place is not None and (place > len(tokenizer) or token in tokenizer.get_vocab()):
        warnings.warn(
            f"no processor is made: image_token_index {place} is not the tokenizer's next id, "
            f"{len(tokenizer)}",
            stacklevel=3,
        )
        return None
    count = (
        {"cross_attention": 1}.get(config.fusion, config.text_config.num_image_tokens)
        if place is not None
        else 0
    )
    size, settings = config.vision_config.image_size, {}
    if images is not None:
        settings = {"image_mean": images.image_mean, "image_std": images.image_std}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    processor = MllamaImageProcessor(
        tokenizer, count or 1, size, image_token=token, chat_template=template, **settings
    )
    processor.image_seq_length = count
    if images is not None:
        own = images.to_dict() | {"size": {"height": size, "width": size}}
        processor.image_processor = SquareImageProcessor.from_dict(own)
    return processor
