from mllama.dropin.vision import SiglipVisionConfig, SiglipVisionModel  # noqa: F401
