"""The module names of older scripts: `model`, `siglip`, `processing_mllama` and so on, on this
package's models and operators.

Importing this package makes them importable, as `PYTHONPATH=$(python -m mllama.dropin)` does for a
script that is left as it is. A file of such a name beside the script comes first, as it would for
Python itself. `modules/` holds the names and nothing else; what they stand for is in this folder
under the same names, `mllama.dropin.model` being what `model` is.
"""

import sys
from pathlib import Path

FOLDER = str(Path(__file__).parent / "modules")

if FOLDER not in sys.path:
    # After the script's own folder, as PYTHONPATH stands; a notebook's, "", comes behind the
    # standard library.
    sys.path.insert(sys.path.index("") + 1 if "" in sys.path else 1, FOLDER)
