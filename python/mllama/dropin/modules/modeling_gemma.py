# ruff: noqa: F401
from mllama.dropin.layers import KVCache
from mllama.dropin.multimodal import GemmaForCausalLM, PaliGemmaForConditionalGeneration
from mllama.hf.names import GemmaConfig, PaliGemmaConfig
