"""Arguments of forward passes by name: which ones a model takes, and how the others are handled.
None is silently ignored.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from mllama.config.spec import ModelSpec

# Passed by transformers, Trainer and TRL to every model, without a meaning for these: there are no
# experts, and input_ids give the modality of every token.
PASSED_OVER = frozenset({"output_router_logits", "mm_token_type_ids"})
_READ = frozenset({"num_items_in_batch"})
# Arguments of stock models that are not supported here: the only accepted value, and the reason.
_FIXED = {
    "is_causal": (None, "text is causal, or as token_type_ids say, and images are bidirectional"),
    "image_sizes": (None, "it is for encoders of images of several sizes (Pixtral's)"),
}


def nearest(name: str, known: Iterable[str]) -> str:
    """End of an error message: the most similar known name, if there is one."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def check_keywords(owner: str, function: Callable, given: dict[str, Any]) -> None:
    """Reject further keywords of a forward pass that are unknown or not supported.

    Raises:
        TypeError: a name is unknown.
        ValueError: an argument of stock models has a value that would change their result.
    """
    for name, (value, why) in _FIXED.items():
        if given.get(name, value) not in (value, None):
            raise ValueError(f"{name} must be {value}: {why}")
    for name in given:  # torch 2.11 cannot compile set operations
        if name not in PASSED_OVER and name not in _READ and name not in _FIXED:
            known = [*inspect.signature(function).parameters, *_READ]
            raise TypeError(f"{owner}: {name!r} is not an argument{nearest(name, known)}")


# Arguments of some families only, with the models that take them.
_TILED = (lambda spec: spec.has_tiles, "models with tiled images (Llama-3.2-Vision)")
_SELECTING = (lambda spec: spec.selects_features, "LLaVA")
_SPECIAL: dict[str, tuple[Callable[[ModelSpec], bool], str]] = {
    "aspect_ratio_ids": _TILED,
    "aspect_ratio_mask": _TILED,
    "cross_attention_states": _TILED,
    "cross_attention_mask": (
        lambda spec: bool(spec.text.cross_attention_layers),
        "models with cross-attention layers",
    ),
    "prefix_length": (
        lambda spec: spec.bidirectional_prefix,
        "models with bidirectional prompts (PaliGemma)",
    ),
    "vision_feature_layer": _SELECTING,
    "vision_feature_select_strategy": _SELECTING,
    "interpolate_pos_encoding": (
        lambda spec: spec.takes_other_sizes,
        "SigLIP and CLIP encoders whose patches are merged into the text or averaged",
    ),
    "mm_encoder_outputs": (
        lambda spec: spec.encoder is not None and not spec.has_tiles,
        "models with a SigLIP or CLIP encoder",
    ),
}
_IMAGE_ARGUMENTS = frozenset({"pixel_values", "image_features", "token_type_ids", *_SPECIAL})


def taken_by(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Remove arguments of images and prompts that another model, ours or transformers', does not
    take.
    """
    known, spec = inspect.signature(model.forward).parameters, getattr(model, "spec", None)

    def takes(name: str) -> bool:
        if name in ("pixel_values", "image_features") and spec is not None:
            return name in known and spec.encoder is not None
        return name in known and (spec is None or name not in _SPECIAL or _SPECIAL[name][0](spec))

    return {
        name: value for name, value in given.items() if name not in _IMAGE_ARGUMENTS or takes(name)
    }


def check_special(model: Any, **given: Any) -> None:
    """Reject arguments of other families.

    Args:
        model: a model of this package.
        given: arguments by name; None and False mean not given.

    Raises:
        ValueError: an argument is another family's; the message says which models take it.
    """
    for name, value in given.items():
        takes, who = _SPECIAL[name]
        if value is not None and value is not False and not takes(model.spec):
            family = model.config.model_type
            raise ValueError(f"{name} is for {who}; this {family} model does not take it")
