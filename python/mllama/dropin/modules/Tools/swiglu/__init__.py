from mllama.dropin.Tools.swiglu import *  # noqa: F403
