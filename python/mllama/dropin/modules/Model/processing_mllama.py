from mllama.dropin.processing_mllama import *  # noqa: F403
