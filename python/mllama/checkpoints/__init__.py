"""Model folders and files: which format one has, and reading and writing it. A folder's
`model_type` decides, exactly.
"""

from mllama.checkpoints.models import load
from mllama.checkpoints.opening import open_checkpoint

__all__ = ["load", "open_checkpoint"]
