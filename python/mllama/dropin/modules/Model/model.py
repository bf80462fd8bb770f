from mllama.dropin.model import *  # noqa: F403
