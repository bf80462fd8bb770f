"""Combines a loaded Llama and a loaded SigLIP into one model, with its processor."""

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from mllama.fusion.cross_attention import CrossAttentionDecoderLayer
from mllama.fusion.projector import make_pooling, make_projector
from mllama.hf.compat import config_fields
from mllama.hf.configs import MllamaConfig
from mllama.hf.modeling import MllamaForConditionalGeneration
from mllama.hf.processors.auto import load_processor
from mllama.hf.processors.llava import MllamaImageProcessor
from mllama.hf.processors.square import SquareImageProcessor
from mllama.hf.siglip import SiglipModel
from mllama.processing.prompt import IMAGE_TOKEN
from mllama.quant.packer import packing_of

_Module = TypeVar("_Module", bound=nn.Module)
_NOT_OPTIONS = {
    "self",
    "vision_config",
    "text_config",
    "fusion",
    "vocab_size",
    "hidden_size",
    "pad_token_index",
    "kwargs",
}
_OPTIONS = sorted(inspect.signature(MllamaConfig.__init__).parameters.keys() - _NOT_OPTIONS)


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
        ValueError: the text model is not a Llama, or is packed; the models differ in dtype or
            device; an option is invalid.
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
    model = _join(text_model, vision_model, fusion, options)
    if tokenizer is not None:
        model.processor = _processor(
            model.config, tokenizer, _found(vision_model, SquareImageProcessor)
        )
    return model


def _join(
    text_model: MllamaForConditionalGeneration,
    vision_model: SiglipModel,
    fusion: str,
    options: dict[str, Any],
) -> MllamaForConditionalGeneration:
    """`fuse` without a processor."""
    _check(text_model, vision_model, options)
    config = MllamaConfig(
        vision_model.config, config_fields(text_model.config), fusion=fusion, **options
    )
    config.dtype = text_model.dtype
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    model.vision_tower = _sharing(vision_model.vision_tower)
    model.lm_head = _sharing(text_model.lm_head)
    _take_decoder(model, text_model)
    with torch.device(text_model.device):
        _make_new(model, text_model.dtype)
    model.generation_config = copy.deepcopy(text_model.generation_config)
    return model.train(text_model.training)


def _check(text_model: Any, vision_model: Any, options: dict[str, Any]) -> None:
    if not isinstance(text_model, MllamaForConditionalGeneration):
        raise TypeError(
            f"text_model must be an MllamaForConditionalGeneration, got {type(text_model).__name__}"
        )
    if text_model.config.model_type != "llama":
        raise ValueError(
            "text_model must be a Llama without an encoder (model_type 'llama'), "
            f"got {text_model.config.model_type!r}"
        )
    if packing_of(text_model) is not None:
        raise ValueError("text_model must not be packed: fuse first, then pack")
    if not isinstance(vision_model, SiglipModel):
        raise TypeError(f"vision_model must be a SiglipModel, got {type(vision_model).__name__}")
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise TypeError(
            f"fuse got options it does not know: {', '.join(unknown)}; they are "
            f"{', '.join(_OPTIONS)}"
        )
    for name in ("dtype", "device"):
        ours, theirs = getattr(text_model, name), getattr(vision_model, name)
        if ours != theirs:
            raise ValueError(
                f"text_model and vision_model must have one {name}, got {ours} and {theirs}"
            )


def _sharing(module: _Module) -> _Module:
    """New modules with the same parameters: their indices in a cache may differ."""
    return copy.deepcopy(
        module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    )


def _take_decoder(
    model: MllamaForConditionalGeneration, text_model: MllamaForConditionalGeneration
) -> None:
    decoder, source = model.language_model, text_model.language_model
    decoder.embed_tokens, decoder.norm = _sharing(source.embed_tokens), _sharing(source.norm)
    places = [
        index
        for index in range(len(decoder.layers))
        if index not in (decoder.config.cross_attention_layers or ())
    ]
    for index, layer in zip(places, source.layers, strict=True):
        ours: Any = _sharing(layer)
        ours.self_attn.layer_idx = index
        decoder.layers[index] = ours


def _make_new(model: MllamaForConditionalGeneration, dtype: torch.dtype) -> None:
    """Create the parts that neither model has."""
    spec = model.spec
    made = {"multi_modal_projector": make_projector(spec)}
    if spec.pooling is not None:
        made["image_pooling"] = make_pooling(spec)
    for index in spec.text.cross_attention_layers or ():
        made[f"language_model.layers.{index}"] = CrossAttentionDecoderLayer(spec.text, index)
    for name, module in made.items():
        model.set_submodule(name, module.to(dtype).apply(model._init_weights))


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
    config: Any, tokenizer: PreTrainedTokenizerBase, images: SquareImageProcessor | None
) -> MllamaImageProcessor | None:
    """A processor that writes as many placeholders per image as the fusion needs, possibly none."""
    token: Any = IMAGE_TOKEN
    place = config.image_token_index
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
    settings: dict[str, Any] = {}
    size = config.vision_config.image_size
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
