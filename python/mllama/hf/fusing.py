"""Combines a loaded Llama and a loaded SigLIP into one model."""

import copy
import inspect
from typing import Any, TypeVar

import torch
from torch import nn

from mllama.fusion.cross_attention import CrossAttentionDecoderLayer
from mllama.fusion.projector import make_pooling, make_projector
from mllama.hf.compat import config_fields
from mllama.hf.configs import MllamaConfig
from mllama.hf.modeling import MllamaForConditionalGeneration
from mllama.hf.siglip import SiglipModel
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
    **options: Any,
) -> MllamaForConditionalGeneration:
    """Combine a text and a vision model into one. It shares their parameters: nothing is copied,
    and training one trains the other.

    The parts between them (projector, learned pooling, cross-attention layers) are new and random,
    except that gates are zero: with fusion="cross_attention" the logits equal the text model's bit
    for bit until something is trained.

    Args:
        text_model: a Llama, as `MllamaForConditionalGeneration.from_pretrained` loads it from a
            folder or a GGUF file.
        vision_model: as `SiglipModel.from_pretrained` loads it. A pooling head is left out.
        fusion: "merge", "prepend" or "cross_attention", as in `MllamaConfig`.
        options: further arguments of `MllamaConfig`: `image_token_index`, `projector`,
            `num_image_tokens`, `cross_attention_every` ...

    Returns:
        A `siglip_llama` with the text model's dtype, device and training mode.

    Raises:
        TypeError: a model has the wrong type, or an option is unknown.
        ValueError: the text model is not a Llama, or is packed; the models differ in dtype or
            device; an option is invalid.
    """
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
