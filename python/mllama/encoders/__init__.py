"""Image encoders by their name in a model's spec."""

from mllama.encoders.clip import ClipImageEncoder
from mllama.encoders.siglip import SiglipImageEncoder
from mllama.encoders.tiled_vit import TiledImageEncoder

ENCODERS = {"siglip": SiglipImageEncoder, "clip": ClipImageEncoder, "tiled": TiledImageEncoder}
