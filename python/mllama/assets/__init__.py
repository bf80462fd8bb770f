"""What comes with the package besides code."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"  # the model folder that `mllama.load()` reads
