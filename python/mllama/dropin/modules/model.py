# ruff: noqa: F401
from mllama import (
    Linear_LORA,
    Tokenizer,
    convert_linears_to_lora,
    convert_to_lora,
    replace_linear_with_lora,
)
from mllama.dropin.config import LLAMA32_CONFIG, LLAMA32Config, MLLAMAConfig
from mllama.dropin.generate import (
    assign,
    generate,
    load_weights_into_llama,
    text_to_tokens,
    token_to_text,
)
from mllama.dropin.layers import KVCache, LLAMARotaryEmbedding, RMSNorm, compute_rope_params, rope
from mllama.dropin.layers import RMSNorm as LLAMARMSNorm
from mllama.dropin.multimodal import MllamaForConditionalGeneration, MultiModalProjector
from mllama.dropin.text import (
    FeedForward,
    GroupQueryAttention,
    Llama3ForCausalLM,
    Llama3Model,
    TransformerBlock,
)
