from mllama.dropin.multimodal import load_tolerantly as load_hf_model  # noqa: F401
