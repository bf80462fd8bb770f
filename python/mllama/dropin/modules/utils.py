from mllama.dropin.multimodal import load_strictly as load_hf_model  # noqa: F401
