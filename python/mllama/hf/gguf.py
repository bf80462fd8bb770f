"""Saves a transformers model as a GGUF file."""

import os

from transformers import PreTrainedTokenizerBase

from mllama.checkpoints.gguf.writer import write_gguf
from mllama.hf.built import check_built
from mllama.hf.modeling import MllamaForConditionalGeneration


def save_gguf(
    model: MllamaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    dtype: str = "f16",
) -> None:
    """Write a model's decoder and its tokenizer with `mllama.checkpoints.gguf.writer.write_gguf`,
    using the end tokens of the model's generation config.

    Raises:
        ValueError, TypeError: as `write_gguf`; the config was changed to describe another model.
    """
    if not isinstance(model, MllamaForConditionalGeneration):
        raise TypeError(
            f"model must be an MllamaForConditionalGeneration, got {type(model).__name__}"
        )
    check_built(model)
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    write_gguf(model.spec, model.state_dict(), tokenizer, path, dtype, ends)
