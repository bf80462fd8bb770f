"""LoRA (Hu et al., 2021): low-rank adapters for the linear layers of any module, in place."""

from mllama.lora.adapt import Adapted, adapt
from mllama.lora.convert import convert_linears_to_lora, convert_to_lora, replace_linear_with_lora
from mllama.lora.layer import Linear_LORA
from mllama.lora.loading import load_lora
from mllama.lora.named import activate_lora, combine_lora, delete_lora, lora_active, lora_names
from mllama.lora.saving import save_lora
from mllama.lora.state import (
    lora_disabled,
    lora_parameters,
    merge_and_unload,
    merge_lora,
    unmerge_lora,
)

__all__ = [
    "Adapted",
    "Linear_LORA",
    "activate_lora",
    "adapt",
    "combine_lora",
    "convert_linears_to_lora",
    "convert_to_lora",
    "delete_lora",
    "load_lora",
    "lora_active",
    "lora_disabled",
    "lora_names",
    "lora_parameters",
    "merge_and_unload",
    "merge_lora",
    "replace_linear_with_lora",
    "save_lora",
    "unmerge_lora",
]
