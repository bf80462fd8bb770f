from mllama.dropin.Tools.swiglu.FusedSwiglu import *  # noqa: F403
