"""Model folders and files: detecting the format, reading and writing. A folder's exact `model_type`
selects its family.
"""

from mllama.checkpoints.models import load
from mllama.checkpoints.opening import open_checkpoint

__all__ = ["load", "open_checkpoint"]
