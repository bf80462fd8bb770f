from mllama.dropin.processing_paligemma import *  # noqa: F403
