"""Images to ask about, for engines on any Python."""

import os
import tempfile
from pathlib import Path

QUESTION, NEXT_QUESTION = "What is shown?", "Where is it?"


class Photos:
    """Images of random pixels; no two are equal, so that none is in an engine's cache."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()

    def new(self, side: int) -> Path:
        """The path of a new file of side x side pixels (binary PPM)."""
        path = Path(self._folder.name) / f"{side}.ppm"
        path.write_bytes(f"P6 {side} {side} 255\n".encode() + os.urandom(3 * side * side))
        return path
