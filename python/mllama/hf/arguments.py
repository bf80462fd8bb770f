"""Arguments by name: which of them a model takes, and what becomes of the others. None is accepted
and ignored.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from mllama.config.spec import ModelSpec

# What transformers, Trainer and TRL hand to every model, and has no meaning in these: there are no
# experts, and input_ids tell the modality of every token.
PASSED_OVER = frozenset({"output_router_logits", "mm_token_type_ids"})
_READ = frozenset({"num_items_in_batch"})
# The only value of arguments that stock models take and these do not compute, and why.
_FIXED = {
    "is_causal": (None, "text is seen one way, or as token_type_ids say, and images both ways"),
    "image_sizes": (None, "it is for towers that take images of several sizes (Pixtral's)"),
}


def nearest(name: str, known: Iterable[str]) -> str:
    """Text to end an error with: the known name that is most like an unknown one, where one is."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def check_keywords(owner: str, function: Callable, given: dict[str, Any]) -> None:
    """Refuse further keywords of a forward pass that mean nothing, or something that is not
    computed.

    Raises:
        TypeError: a name that is not known.
        ValueError: a name that stock models know, with a value that would change the result there.
    """
    for name, (value, why) in _FIXED.items():
        if given.get(name, value) not in (value, None):
            raise ValueError(f"{name} must be {value}: {why}")
    for name in given:  # torch 2.11 compiles no arithmetic on sets
        if name not in PASSED_OVER and name not in _READ and name not in _FIXED:
            known = [*inspect.signature(function).parameters, *_READ]
            raise TypeError(f"{owner}: {name!r} is not an argument{nearest(name, known)}")


# Arguments that some families alone have, and who has them.
_TILED = (lambda spec: spec.has_tiles, "models that cut images into tiles (Llama-3.2-Vision)")
_SELECTING = (lambda spec: spec.selects_features, "LLaVA")
_SPECIAL: dict[str, tuple[Callable[[ModelSpec], bool], str]] = {
    "aspect_ratio_ids": _TILED,
    "aspect_ratio_mask": _TILED,
    "cross_attention_states": _TILED,
    "cross_attention_mask": (
        lambda spec: bool(spec.text.cross_attention_layers),
        "models whose layers attend to images",
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
    """Arguments without those of images and prompts that another model, ours or of transformers,
    does not take.
    """
    known, spec = inspect.signature(model.forward).parameters, getattr(model, "spec", None)

    def takes(name: str) -> bool:
        if name in ("pixel_values", "image_features") and spec is not None:
            return spec.encoder is not None
        return name in known and (spec is None or name not in _SPECIAL or _SPECIAL[name][0](spec))

    return {
        name: value for name, value in given.items() if name not in _IMAGE_ARGUMENTS or takes(name)
    }


def check_special(model: Any, **given: Any) -> None:
    """Reject arguments that other families have.

    Args:
        model: ours.
        given: arguments by name; those that are None or False were not given.

    Raises:
        ValueError: names the argument and who takes it.
    """
    for name, value in given.items():
        takes, who = _SPECIAL[name]
        if value is not None and value is not False and not takes(model.spec):
            family = model.config.model_type
            raise ValueError(f"{name} is for {who}; this {family} model does not take it")
