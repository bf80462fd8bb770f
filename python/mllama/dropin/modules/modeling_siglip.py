from mllama.dropin.modeling_siglip import *  # noqa: F403
