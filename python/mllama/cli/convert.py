"""`mllama convert IN OUT`: a model with its tokenizer or processor from one format to another."""

import argparse
import sys
import warnings
from pathlib import Path

from mllama.checkpoints import open_checkpoint
from mllama.checkpoints.files import check_free
from mllama.checkpoints.hub import find_folder
from mllama.cli._options import DTYPES
from mllama.cli._parser import GGUF_DTYPES
from mllama.device import dtype_name
from mllama.families import written_as
from mllama.hf.checkpoints import load_opened
from mllama.hf.models import model_class
from mllama.hf.names import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from mllama.hf.processors.auto import load_processor, processor_to_write, write_both
from mllama.lora.loading import load_lora
from mllama.lora.state import merge_and_unload

_LLAVA = (
    "LLaVA needs a vision encoder whose features are read before its final norm and all merged "
    "into the text of a Llama, a projector of two layers as wide inside as the decoder, and a "
    "placeholder within the vocabulary"
)


def run(arguments: argparse.Namespace) -> None:
    """Convert a model and print what was written."""
    target, to_gguf = Path(arguments.target), arguments.to == "gguf"
    kinds = GGUF_DTYPES if to_gguf else DTYPES
    dtype = arguments.dtype or kinds[0]
    if dtype not in kinds:
        raise ValueError(f"--to {arguments.to} takes --dtype {', '.join(kinds)}, got {dtype}")
    check_free(target, arguments.force, ".gguf" if to_gguf else None)
    source = find_folder(arguments.source)
    with (opened := open_checkpoint(source)).source:
        if opened.packing is not None:
            raise ValueError(
                f"{source} has packed weights, which are not converted: give the model that they "
                "were packed from"
            )
        kind = written_as(opened.config)["model_type"]
        if arguments.to == "llava" and kind != "llava":
            raise ValueError(f"{source} holds a {kind}, which cannot be written as LLaVA. {_LLAVA}")
        model, _ = load_opened(model_class(opened.spec), opened, "auto" if to_gguf else dtype)
    if arguments.adapter is not None:
        load_lora(model, arguments.adapter)
        model = merge_and_unload(model)
    processor = load_processor(source) if to_gguf else processor_to_write(source)
    if to_gguf:
        _write_gguf(model, processor, target, dtype)
        print(f"{target}: the decoder of a {kind} in {dtype}")
    else:
        write_both(target, model, processor)
        print(f"{target}: a {kind} in {dtype_name(model.dtype)}")


def _write_gguf(model: PreTrainedModel, processor, target: Path, dtype: str) -> None:
    # Imported here: the gguf library is an optional dependency.
    from mllama.hf.gguf import save_gguf

    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError("a SigLIP vision model has no decoder to write as GGUF")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        save_gguf(model, tokenizer, target, dtype)
    for warning in caught:
        print(f"mllama: {warning.message}", file=sys.stderr)
