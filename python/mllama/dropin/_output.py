"""What the models of older scripts return."""

from dataclasses import dataclass, fields
from typing import Any

from transformers import Cache

from mllama.hf.modeling import MllamaOutput


@dataclass
class OlderOutput(MllamaOutput):
    """`MllamaOutput`, whose cache scripts call `kv_cache`. By its name every field can be read,
    None where there is nothing.
    """

    @property
    def kv_cache(self) -> Cache | None:
        """The cache, where one was used."""
        return self.cache

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str) and key in _NAMES:
            return getattr(self, key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return self.kv_cache is not None if key == "kv_cache" else super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict's, `kv_cache` too."""
        if key not in self:
            return default
        return self[key]


_NAMES = {"kv_cache", "past_key_values", *(field.name for field in fields(MllamaOutput))}
