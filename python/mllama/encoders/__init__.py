"""Image encoders, by the name that a model's spec has."""

from mllama.encoders.clip import ClipVisionTower
from mllama.encoders.siglip import SiglipVisionTower
from mllama.encoders.tiled_vit import TiledVisionTower

ENCODERS = {"siglip": SiglipVisionTower, "clip": ClipVisionTower, "tiled": TiledVisionTower}
