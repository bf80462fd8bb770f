"""Stock transformers classes, for `generate --runtime transformers` and `verify`."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mllama.checkpoints.files import CONFIG, find_gguf, find_inside, read_json
from mllama.config.packing import split_packing
from mllama.families import MODEL_TYPES


def adapt_stock(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Put an adapter into a stock model, by PEFT.

    Args:
        model: the model; its layers are changed in place.
        adapter: a folder in PEFT's format, with the stock class's names.

    Raises:
        ImportError: PEFT is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise ImportError("--adapter needs PEFT to compare with: pip install peft") from None
    return PeftModel.from_pretrained(model, adapter).get_base_model()


def load_stock(folder: Path, dtype: str | torch.dtype) -> PreTrainedModel:
    """Load a model with its stock class, in eval mode on the CPU.

    Args:
        folder: a folder with config.json or a GGUF file; or that file.
        dtype: dtype of the model.

    Raises:
        ValueError: transformers cannot read it.
    """
    options = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False}
    if (folder / CONFIG).is_file():
        content, packing = split_packing(read_json(find_inside(folder, CONFIG)))
        if packing is not None:
            raise ValueError(f"stock transformers does not read {folder}, whose weights are packed")
        kind = content.get("model_type")
        family = MODEL_TYPES.get(kind)
        if family is None or family.stock_class is None:
            raise ValueError(
                f"stock transformers has no class for {folder}, of model_type {kind!r}"
            )
        stock = getattr(transformers, family.stock_class)
        return stock.from_pretrained(folder, use_safetensors=True, **options).eval()
    if (file := find_gguf(folder)) is None:
        raise ValueError(
            f"stock transformers does not read {folder}: it has no {CONFIG} and is no GGUF file"
        )
    # Imported here: the gguf library is an optional dependency.
    from mllama.checkpoints.gguf.reader import open_gguf

    options |= {"gguf_file": file.name}
    config = AutoConfig.from_pretrained(file.parent, **options)
    # transformers does not read rotary scaling.
    config.rope_parameters = open_gguf(file).config["rope_parameters"]
    return AutoModelForCausalLM.from_pretrained(file.parent, config=config, **options).eval()
