"""What a format of model files is, and what an opened model folder or file has."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from mllama.checkpoints.sources import Source
from mllama.weights.rows import Table


@dataclass(frozen=True)
class Format:
    """One kind of Hugging Face model folder.

    Attributes:
        config_class: of the configs that `from_file` gives and `to_file` takes.
        table: config -> the rows between the files' tensors and the model's.
        from_file: the content of config.json -> the config. Raises ValueError for what cannot be.
        to_file: config -> the content of config.json, without dtype and version.
    """

    config_class: type[PretrainedConfig]
    table: Callable[[PretrainedConfig], Table]
    from_file: Callable[[dict[str, Any]], PretrainedConfig]
    to_file: Callable[[PretrainedConfig], dict[str, Any]]


@dataclass(frozen=True)
class Opened:
    """A model folder or file, its headers known and no tensor read.

    Attributes:
        config: of the model.
        table: between the source's tensors and the model's.
        source: of the tensors; who opened it closes it.
        generation: the arguments of a GenerationConfig, None where the files say nothing.
        changed: whether the weights' files are others now than when they were opened.
    """

    config: PretrainedConfig
    table: Table
    source: Source
    generation: dict[str, Any] | None = None
    changed: Callable[[], bool] = lambda: False
