from mllama.dropin.Tools import *  # noqa: F403
