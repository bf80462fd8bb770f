"""Rotary parameters: every spelling of config.json -> one checked dict."""

from collections.abc import Mapping
from typing import Any

from mllama.config.checks import ROPE_TYPES, check_choice, check_kind, check_number, check_size

_NEEDED = {"llama3": ("factor", "low_freq_factor", "high_freq_factor"), "linear": ("factor",)}
_SPELLINGS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


def settle_rope(owner: str, config: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """A copy of a decoder's config with `rope_parameters` in place of the older `rope_theta` and
    `rope_scaling`. Its `rope_type` and `rope_theta` are always set.

    Args:
        owner: name used in errors.
        config: the decoder's config.
        theta: the default.

    Raises:
        ValueError: invalid or contradictory values; the message names the field.
    """
    given = {name: config.get(name) for name in _SPELLINGS}
    for name in ("rope_parameters", "rope_scaling"):
        if given[name] is not None:
            check_kind(owner, name, given[name], dict)
    parameters = dict(given["rope_scaling"] or given["rope_parameters"] or {})
    kind = parameters.pop("type", "default")
    parameters.setdefault("rope_type", kind)
    thetas = [given["rope_theta"], parameters.get("rope_theta")]
    thetas = [value for value in thetas if value is not None]
    for value in thetas:
        check_number(owner, "rope_theta", value)
    if len(set(thetas)) > 1:
        raise ValueError(f"{owner}: rope_theta is given twice: {thetas}")
    parameters["rope_theta"] = thetas[0] if thetas else theta
    check_rope(owner, parameters)
    check_choice(owner, "partial_rotary_factor", given["partial_rotary_factor"], (None, 1))
    if parameters["rope_type"] == "llama3":
        if parameters.get("original_max_position_embeddings") is None:  # as transformers reads it
            parameters["original_max_position_embeddings"] = config["max_position_embeddings"]
        check_size(
            owner,
            "rope_parameters['original_max_position_embeddings']",
            parameters["original_max_position_embeddings"],
        )
    rest = {name: value for name, value in config.items() if name not in _SPELLINGS}
    return rest | {"rope_parameters": parameters}


def settle_ropes(
    owner: str, config: Mapping[str, Any], thetas: Mapping[str, float]
) -> dict[str, Any]:
    """`settle_rope` for a decoder with one `rope_parameters` per kind of layer (Gemma 3). In the
    older spelling `rope_theta` and `rope_scaling` belong to the full-attention layers,
    `rope_local_base_freq` to the sliding-window layers.

    Args:
        thetas: {kind of layer: default theta}.
    """
    ropes = config.get("rope_parameters")
    ropes = {} if ropes is None else ropes
    check_kind(owner, "rope_parameters", ropes, dict)
    if unknown := ropes.keys() - thetas.keys():
        raise ValueError(
            f"{owner}: rope_parameters must be those of {' and '.join(thetas)}, "
            f"got {', '.join(map(repr, unknown))}"
        )
    scaling = config.get("rope_scaling")
    if scaling is not None:
        check_kind(owner, "rope_scaling", scaling, dict)
    if (local := config.get("rope_local_base_freq")) is not None:
        check_number(owner, "rope_local_base_freq", local)
    older = {
        "full_attention": (config.get("rope_theta"), scaling or {}),
        "sliding_attention": (local, {}),
    }
    settled = {}
    for kind, default in thetas.items():
        theta, more = older[kind]
        check_kind(owner, f"rope_parameters[{kind!r}]", part := ropes.get(kind) or {}, dict)
        given = {"rope_parameters": part | more, "rope_theta": theta}
        given["max_position_embeddings"] = config["max_position_embeddings"]
        settled[kind] = settle_rope(owner, given, default)["rope_parameters"]
    spellings = (*_SPELLINGS, "rope_local_base_freq")
    rest = {name: value for name, value in config.items() if name not in spellings}
    return rest | {"rope_parameters": settled}


def check_rope(owner: str, parameters: Mapping[str, Any]) -> None:
    """Check the scaling of one set of rotary frequencies.

    Raises:
        ValueError: the scaling is not supported, or its numbers are invalid.
    """
    if nested := [name for name, value in parameters.items() if isinstance(value, dict)]:
        raise ValueError(
            f"{owner}: rope_parameters per kind of layer ({nested[0]}) are not supported"
        )
    kind = parameters["rope_type"]
    check_choice(owner, "rope_parameters['rope_type']", kind, ROPE_TYPES)
    part = parameters.get("partial_rotary_factor")
    check_choice(owner, "rope_parameters['partial_rotary_factor']", part, (None, 1))
    for name in _NEEDED.get(kind, ()):
        check_number(owner, f"rope_parameters[{name!r}]", parameters.get(name))
    if kind == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        if not low < high:  # frequencies between the two are interpolated
            raise ValueError(
                f"{owner}: rope_parameters: high_freq_factor {high!r} must be above "
                f"low_freq_factor {low!r}"
            )
