from mllama.dropin.modeling_gemma import *  # noqa: F403
