"""The operators: public functions, each with a reference in plain torch. Importing this package
registers them with torch.
"""

from mllama.ops.attention import attention, attention_weights
from mllama.ops.dequantized_linear import dequantized_linear
from mllama.ops.gated import geglu, swiglu
from mllama.ops.image import resize, resize_normalize
from mllama.ops.layer_norm import layer_norm
from mllama.ops.linear_cross_entropy import linear_cross_entropy
from mllama.ops.lora_linear import LoraLayer, lora_linear, lora_linears
from mllama.ops.packed_gguf import pack_gguf, unpack_gguf
from mllama.ops.packed_linear import pack_weight, packed_linear, unpack_weight
from mllama.ops.patch_embed import patch_embed
from mllama.ops.quantized_rows import dequantize_rows, quantize_rows
from mllama.ops.rms_norm import add_rms_norm, rms_norm
from mllama.ops.rope import rope, rope_frequencies, rope_tables
from mllama.ops.select_token import select_token

__all__ = [
    "LoraLayer",
    "add_rms_norm",
    "attention",
    "attention_weights",
    "dequantize_rows",
    "dequantized_linear",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linears",
    "pack_gguf",
    "pack_weight",
    "packed_linear",
    "patch_embed",
    "quantize_rows",
    "resize",
    "resize_normalize",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_tables",
    "select_token",
    "swiglu",
    "unpack_gguf",
    "unpack_weight",
]
