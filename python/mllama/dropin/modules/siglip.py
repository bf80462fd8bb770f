from mllama.dropin.siglip import *  # noqa: F403
