"""`fuse` with a processor: combines two loaded models and builds the processor of the result."""

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
    """Combine a text and a vision model into one. It shares their parameters: nothing is copied,
    and training one trains the other.

    The parts between them (projector, learned pooling, cross-attention layers) are new and random,
    except that gates are zero: with fusion="cross_attention" the logits equal the text model's bit
    for bit until something is trained.

    The model's `processor` is built from the tokenizer (and chat template) in the text model's
    folder and the image settings in the vision model's, and saved with the model, so that
    `mllama.load` can read the folder. It is None if there is no tokenizer.

    Args:
        text_model: a Llama, as `MllamaForConditionalGeneration.from_pretrained` loads it from a
            folder or a GGUF file.
        vision_model: as `SiglipModel.from_pretrained` loads it. A pooling head is left out.
        fusion: "merge", "prepend" or "cross_attention", as in `MllamaConfig`.
        tokenizer: replaces the one in the text model's folder; it is copied.
        options: further arguments of `MllamaConfig`: `image_token_index` (default with "merge":
            the tokenizer's `<image>`, added if it is missing), `projector`, `num_image_tokens`,
            `cross_attention_every` ...

    Returns:
        A `siglip_llama` with the text model's dtype, device and training mode.

    Raises:
        TypeError: a model or the tokenizer has the wrong type, or an option is unknown.
        ValueError: the text model is not a Llama, the models differ in dtype or device, or an
            option is invalid.
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
    """The processor part in the folder of a model, if it has the given type; else None."""
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
    """A processor that writes as many placeholders per image as the fusion needs, possibly none."""
    token, place = IMAGE_TOKEN, config.image_token_index
    if place is not None and place < len(tokenizer):
        token = tokenizer.convert_ids_to_tokens(place)
        if token not in tokenizer.get_added_vocab():
            warnings.warn(
                f"no processor is built: image_token_index {place} is an ordinary token, "
                f"{token!r}; give a special one",
                stacklevel=3,
            )
            return None
    elif place is not None and (place > len(tokenizer) or token in tokenizer.get_vocab()):
        warnings.warn(
            f"no processor is built: image_token_index {place} is not the tokenizer's next id, "
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
