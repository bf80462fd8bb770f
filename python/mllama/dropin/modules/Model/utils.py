from mllama.dropin.Model.utils import *  # noqa: F403
