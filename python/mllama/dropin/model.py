"""What older scripts import from `model`."""

from mllama.dropin._attention import GroupQueryAttention, repeat_kv
from mllama.dropin._cache import KVCache
from mllama.dropin._config import MLLAMAConfig
from mllama.dropin._generate import generate, text_to_tokens, token_to_text
from mllama.dropin._multimodal import MllamaForConditionalGeneration, MultiModalProjector
from mllama.dropin._rope import (
    LLAMARotaryEmbedding,
    apply_rotary_pos_emb,
    compute_rope_params,
    rope,
    rotate_half,
)
from mllama.dropin._text import (
    FeedForward,
    Llama3ForCausalLM,
    Llama3Model,
    LLAMARMSNorm,
    RMSNorm,
    TransformerBlock,
)
from mllama.dropin._text_config import LLAMA32_CONFIG, LLAMA32Config
from mllama.dropin._weights import assign, load_weights_into_llama
from mllama.dropin.Tools import FusedFeedForward
from mllama.lora import (
    Linear_LORA,
    convert_linears_to_lora,
    convert_to_lora,
    replace_linear_with_lora,
)
from mllama.processing.tokenizer import Tokenizer

__all__ = [
    "LLAMA32_CONFIG",
    "FeedForward",
    "FusedFeedforward",
    "GroupQueryAttention",
    "KVCache",
    "LLAMA32Config",
    "LLAMARMSNorm",
    "LLAMARotaryEmbedding",
    "Linear_LORA",
    "Llama3ForCausalLM",
    "Llama3Model",
    "MLLAMAConfig",
    "MllamaForConditionalGeneration",
    "MultiModalProjector",
    "RMSNorm",
    "Tokenizer",
    "TransformerBlock",
    "apply_rotary_pos_emb",
    "assign",
    "compute_rope_params",
    "convert_linears_to_lora",
    "convert_to_lora",
    "generate",
    "load_weights_into_llama",
    "repeat_kv",
    "replace_linear_with_lora",
    "rope",
    "rotate_half",
    "text_to_tokens",
    "token_to_text",
]

FusedFeedforward = FusedFeedForward
