"""Model folders and files: which format one has, and reading and writing it. A folder's
`model_type` decides, exactly.
"""

from mllama.checkpoints.models import load_model, save_model, translate_state_dict
from mllama.checkpoints.opening import FORMATS, config_arguments, open_checkpoint

__all__ = [
    "FORMATS",
    "config_arguments",
    "load_model",
    "open_checkpoint",
    "save_model",
    "translate_state_dict",
]
