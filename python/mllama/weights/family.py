"""A model family: everything that differs between families, in one place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mllama.config.checks import check_kind
from mllama.config.files import harmless, to_older
from mllama.config.packing import split_packing
from mllama.config.rope import settle_rope, settle_ropes
from mllama.config.spec import ModelSpec
from mllama.weights.rows import WeightMap

Config = dict[str, Any]


@dataclass(frozen=True)
class Gguf:
    """A family's decoder in llama.cpp's format.

    Attributes:
        architecture: `general.architecture`.
        hidden_act: names of its activation; the first is used when reading.
        rope_types: supported types of rotary scaling.
        permuted: rows of q_proj and k_proj are rotary pairs instead of halves.
        norm_shift: added to the model's norm weights in the file.
        tied: the output head is always the embedding matrix.
    """

    architecture: str
    hidden_act: tuple[str, ...]
    rope_types: tuple[str, ...] = ("default", "linear")
    permuted: bool = False
    norm_shift: float = 0.0
    tied: bool = False


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        name: its `model_type`.
        defaults: transformers' defaults of every config field that is read; parts are nested.
        parts: fields with a config of their own, and the defaults for each kind that is accepted;
            the first is used if the file does not name one.
        read: a complete config -> the spec. Raises ValueError for invalid values.
        weight_map: spec -> rows that map the files' tensors to the model's.
        translate: rewrites the family's own spellings in the content of a config.json.
        settle: fills in fields of a complete config that follow from others.
        written_as: config -> the config that is written, which may be another family's.
        stock_class: transformers' class for such a model, or None.
        processor: kind of its processor in `mllama.processing`: "merged", "tiled", "paligemma",
            "images"; None for a tokenizer alone.
        stock_processor: transformers' class of the processor.
        stock_prefixes: (ours, transformers') prefixes of module names in memory; the first match
            applies, other names are equal.
        write: config -> content of config.json, without dtype and version.
        also: other `model_type`s that are read as this family: their content -> ours.
        gguf: the decoder in llama.cpp's format, or None.
    """

    name: str
    defaults: Config
    read: Callable[[Config], ModelSpec]
    weight_map: Callable[[ModelSpec], WeightMap]
    parts: Mapping[str, tuple[Config, ...]] = field(default_factory=dict)
    translate: Callable[[Config], Config] = lambda content: content
    settle: Callable[[Config], Config] = lambda config: config
    written_as: Callable[[Config], Config] = lambda config: config
    stock_class: str | None = None
    processor: str | None = None
    stock_processor: str | None = None
    stock_prefixes: tuple[tuple[str, str], ...] = ()
    write: Callable[[Config], Config] = to_older
    also: Mapping[str, Callable[[Config], Config]] = field(default_factory=dict)
    gguf: Gguf | None = None

    def from_json(self, content: Config) -> Config:
        """A complete config from the content of a config.json: defaults are filled in, older
        spellings translated, and fields that could decide what code runs removed.

        Raises:
            ValueError: a part of an unsupported kind, quantized weights, or invalid rotary
                parameters. `compose` checks the rest.
        """
        content, _ = split_packing(harmless(content))
        kind = content.get("model_type", self.name)
        if kind in self.also:
            return self.from_json(self.also[kind](content))
        if "image_token_index" in self.defaults and "image_token_id" in content:
            content.setdefault("image_token_index", content.pop("image_token_id"))
        content = self.translate(content)
        config = complete("config", content, self.defaults)
        for name, kinds in self.parts.items():
            config[name] = _part(name, content.get(name), kinds, self.defaults[name])
        return self.settle(config | {"model_type": self.name})

    def compose(self, content: Config) -> ModelSpec:
        """The checked spec of a config, or of the content of a config.json.

        Raises:
            ValueError: invalid sizes or choices; the message names the field.
        """
        return self.read(self.from_json(content))

    def to_json(self, config: Config) -> Config:
        """The content of a config.json, without dtype and version, for a complete config or its
        non-default fields.
        """
        named = {"model_type": self.name}
        if self.stock_class is not None:
            named["architectures"] = [self.stock_class]
        return self.write(split_packing(harmless(config))[0]) | named


def _part(name: str, part: Any, kinds: tuple[Config, ...], absent: Config) -> Config:
    """A complete config of a part; `absent` if the file has none."""
    if part is None:
        part = absent
    check_kind("config", name, part, dict)
    known = {kind["model_type"]: kind for kind in kinds}
    found = part.get("model_type", kinds[0]["model_type"])
    if not isinstance(found, str) or found not in known:
        raise ValueError(
            f"a {name} of model_type {found!r} is not supported; {', '.join(map(repr, known))} is"
        )
    return complete(name, part, known[found]) | {"model_type": found}


def complete(owner: str, content: Config, defaults: Config) -> Config:
    """Fill in the defaults of a config or part, with rotary parameters in one spelling.

    Raises:
        ValueError: quantized weights, or invalid rotary parameters.
    """
    if content.get("quantization_config") is not None:
        raise ValueError(
            f"{owner}: quantization_config: weights quantized by another library are not supported"
        )
    if "rope_parameters" not in defaults:
        return defaults | content
    rope = defaults["rope_parameters"]
    without = {name: value for name, value in defaults.items() if name != "rope_parameters"}
    if "rope_theta" in rope:
        return settle_rope(owner, without | content, rope["rope_theta"])
    thetas = {kind: part["rope_theta"] for kind, part in rope.items()}
    return settle_ropes(owner, without | content, thetas)
