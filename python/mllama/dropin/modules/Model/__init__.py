from mllama.dropin.Model import *  # noqa: F403
