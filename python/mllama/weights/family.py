"""A family of models: everything about it that differs from other families, in one place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mllama.config.checks import check_kind
from mllama.config.files import harmless, to_older
from mllama.config.rope import settle_rope, settle_ropes
from mllama.config.spec import ModelSpec
from mllama.weights.rows import WeightMap

Config = dict[str, Any]


@dataclass(frozen=True)
class Gguf:
    """A family's decoder as llama.cpp has it.

    Attributes:
        architecture: `general.architecture`.
        hidden_act: names of its activation, the first where the file is read.
        rope_types: scalings of the rotary frequencies that it has.
        permuted: q_proj's and k_proj's rows are pairs that rotate, not halves.
        norm_shift: the file's norms are the model's and this.
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
    """One kind of model.

    Attributes:
        name: its `model_type`.
        defaults: what config.json need not say: transformers' defaults of every field that is read
            here. Parts have tables of their own in it.
        parts: fields with a config of their own, and the defaults of each kind that they may be
            of; the first where the file does not say which.
        read: a complete config -> the spec. Raises ValueError for what cannot be.
        weight_map: spec -> the rows between the files' tensors and the model's.
        translate: changes the content of a config.json that has spellings of the family's own.
        settle: changes a complete config where fields follow from one another.
        written_as: config -> the config that it is written under, which may be another family's.
        stock_class: transformers' class of such a model; None where there is none.
        processor: the kind of its processor in `mllama.processing`: "merged", "tiled",
            "paligemma", "images"; None where a tokenizer is enough.
        stock_processor: the processor's class in transformers.
        stock_prefixes: (ours, transformers'): how the names of modules begin in memory, the first
            that fits a name; what is not there has one name.
        write: config -> content of config.json, without dtype and version.
        also: further `model_type`s of files that hold such a model: their content -> ours.
        gguf: the decoder as llama.cpp has it; None where it has none.
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
        """A complete config from the content of a config.json: absent fields have their defaults,
        older spellings are translated, fields that could steer what code runs are gone.

        Raises:
            ValueError: a part of another kind, quantized weights, rotary frequencies that cannot
                be. What else is wrong `compose` finds.
        """
        content = harmless(content)
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
        """The checked spec of a config, which may be the content of a config.json.

        Raises:
            ValueError: sizes and choices that cannot be; the text names the field.
        """
        return self.read(self.from_json(content))

    def to_json(self, config: Config) -> Config:
        """The content of a config.json, without dtype and version: of a config, or of the fields
        of one that are not at their defaults.
        """
        named = {"model_type": self.name}
        if self.stock_class is not None:
            named["architectures"] = [self.stock_class]
        return self.write(harmless(config)) | named


def _part(name: str, part: Any, kinds: tuple[Config, ...], absent: Config) -> Config:
    """A complete config of a part; `absent` where the file says nothing of it."""
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
    """A config or a part of one with its defaults, the rotary frequencies in one spelling.

    Raises:
        ValueError: quantized weights, rotary frequencies that cannot be.
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
