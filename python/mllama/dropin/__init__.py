"""The module names of older scripts, `model`, `siglip`, `processing_mllama` and so on.

Importing this package makes them importable, as `PYTHONPATH=$(python -m mllama.dropin)` does. A
file of such a name beside the script comes first. `modules/` holds the names alone.
"""

import sys
from pathlib import Path

FOLDER = str(Path(__file__).parent / "modules")

if FOLDER not in sys.path:  # after the script's folder; in a notebook, whose folder is "", after it
    sys.path.insert(sys.path.index("") + 1 if "" in sys.path else 1, FOLDER)
