"""The field of config.json that says that a folder's weights are packed
(docs/packed-weights.md).
"""

from typing import Any

FIELD, METHOD, VERSION = "quantization_config", "mllama", 1  # of config.json


def packing_field(weights: str) -> dict[str, Any]:
    """The value of FIELD for a model that is packed as `weights`."""
    return {"quant_method": METHOD, "version": VERSION, "weights": weights}


def split_packing(content: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Split the content of a config.json into the model's own and how its weights are packed; None
    where they are not, or not by this package.

    Raises:
        ValueError: FIELD is this package's, of another version or without the weights' name.
    """
    found = content.get(FIELD)
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        return content, None
    if found.get("version") != VERSION or isinstance(found["version"], bool):
        raise ValueError(
            f"{FIELD}: version must be {VERSION}, got {str(found.get('version'))[:50]!r}: it needs "
            "another release of mllama"
        )
    weights = found.get("weights")
    if not isinstance(weights, str) or not weights:
        raise ValueError(f"{FIELD}: weights must be a name, got {str(weights)[:50]!r}")
    return {name: value for name, value in content.items() if name != FIELD}, weights
