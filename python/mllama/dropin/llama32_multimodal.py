"""`model` under its other name."""

from mllama.dropin.model import *  # noqa: F403
from mllama.dropin.model import __all__  # noqa: F401
