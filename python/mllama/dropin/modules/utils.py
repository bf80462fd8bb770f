from mllama.dropin.utils import *  # noqa: F403
