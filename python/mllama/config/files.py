"""Reading and writing the content of config.json: unsafe fields, older spellings."""

from collections.abc import Mapping
from typing import Any

# Fields that decide what code runs, or how; and transformers' own `_` names, which it trusts.
_STEERING = ("auto_map", "trust_remote_code", "attn_implementation", "experts_implementation")


def harmless(content: Any) -> Any:
    """A JSON file's content without fields that could decide what code runs, at any depth."""
    if isinstance(content, dict):
        return {
            name: harmless(value)
            for name, value in content.items()
            if not (isinstance(name, str) and name.startswith("_")) and name not in _STEERING
        }
    return [harmless(value) for value in content] if isinstance(content, list) else content


def to_older(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in the older spelling that every release of transformers, vLLM and other
    readers know: `rope_theta` and `rope_scaling` for `rope_parameters`. Dtypes are left out.
    """
    older = {
        name: to_older(value) if isinstance(value, dict) and name.endswith("_config") else value
        for name, value in content.items()
    }
    older.pop("dtype", None)
    older.pop("keys_to_ignore_at_inference", None)  # belongs to the model's class
    rope = dict(older.pop("rope_parameters", None) or {})
    if any(isinstance(part, dict) for part in rope.values()):
        older["rope_parameters"] = rope  # per kind of layer: the older spelling has no such form
    elif rope:
        rope.pop("type", None)
        older["rope_theta"] = rope.pop("rope_theta")
        older["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return older
