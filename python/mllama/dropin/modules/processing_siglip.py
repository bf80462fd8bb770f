from mllama.dropin.processing_siglip import *  # noqa: F403
