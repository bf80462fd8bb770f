from mllama.dropin.llama32_multimodal import *  # noqa: F403
