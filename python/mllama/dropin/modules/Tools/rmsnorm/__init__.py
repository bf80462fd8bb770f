from mllama.dropin.Tools.rmsnorm import *  # noqa: F403
