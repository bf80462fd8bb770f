"""Stock transformers' models and ours with the same weights, and inputs that fit both."""

import functools
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from mllama import MllamaForConditionalGeneration, SiglipModel
from tiny import batches, stock
from tiny.sizes import TILED_IMAGE

TEXTS = [name for name in stock.MAKERS if name.startswith(("llama", "gemma"))]
WITH_IMAGES = [
    name
    for name in stock.MAKERS
    if name.startswith(("llava", "paligemma")) and "unused" not in name
]
ENCODERS = [name for name in stock.MAKERS if name.startswith("siglip_vision_model")]
LANGUAGE = TEXTS + WITH_IMAGES
PAIRED = LANGUAGE + ENCODERS
ONE_EACH = [
    "llama",
    "gemma",
    "gemma2",
    "gemma3_text",
    "llava, clip, -2",
    "llava, siglip, several",
    "paligemma, placeholder beyond the vocabulary",
    "paligemma, gemma2",
]
# The families that a table of arguments or fields asks.
FAMILIES = ["llama", "gemma", "llava, clip, -2", "llava, siglip, several", "paligemma", "mllama"]
# Every model with a batch of all kinds of rows; one of each family with the others.
MIXED = "a row without an image"
MODELS_AND_ROWS = [(name, MIXED) for name in LANGUAGE]
MODELS_AND_ROWS += [(name, rows) for name in ONE_EACH for rows in ("one image", "no image")]
# The same for sessions, where one row is another path than several.
SESSIONS = [*MODELS_AND_ROWS, ("llama", "one row"), ("llava, clip, -2", "one row")]
TILED_ROWS = ["one row", "two images", MIXED, "no image"]  # of Llama-3.2-Vision
# Rows of a batch: an image, or a number of tokens.
ROWS = {
    "one image": (["image", 7], ["image", 3]),
    "two images": ([2, "image", 3, "image", 2], ["image", 4]),
    "a row without an image": (["image", "image", 5], [6], [1, "image", 2]),
    "no image": ([9], [4]),
    "one row": ([3, "image", 5],),
    "equal rows": (["image", 5], ["image", 5]),
    "long": (["image", 60], ["image", 31]),
}


class Pair(NamedTuple):
    """Ours and stock transformers' model, with the same weights, in eval mode. Shared by tests: to
    change one, `make` a new one.
    """

    ours: MllamaForConditionalGeneration | SiglipModel
    theirs: PreTrainedModel

    def images(self, count: int, seed: int = 1) -> torch.Tensor:
        """float [count, 3, S, S] for the model's encoder."""
        config = getattr(self.theirs.config, "vision_config", self.theirs.config)
        return batches.images(count, seed, config.image_size)

    def inputs(
        self, rows: str | tuple = "one image", side: str = "left", completion: int = 0
    ) -> dict[str, torch.Tensor]:
        """A batch of `ROWS`, without their images where the model takes none.

        PaliGemma gets `token_type_ids`: the last `completion` tokens of a row are the completion's.
        """
        rows, spec = ROWS[rows] if isinstance(rows, str) else rows, self.ours.spec
        if not spec.fusion:
            rows = [[part for part in row if part != "image"] for row in rows]
        if self.theirs.config.model_type == "mllama":
            return self._tiled(rows, side)
        index = getattr(self.ours.config, "image_token_index", None)
        lists = [_ids(row, r, [index] * spec.tokens_per_image) for r, row in enumerate(rows)]
        batch = batches.batch(*lists, side=side)
        if count := sum(part == "image" for row in rows for part in row):
            batch["pixel_values"] = self.images(count)
        if spec.bidirectional_prefix:
            types = torch.zeros_like(batch["input_ids"])
            for r, row in enumerate(lists):
                end = types.shape[1] if side == "left" else len(row)
                types[r, end - completion : end] = 1
            batch["token_type_ids"] = types
        return batch

    def _tiled(self, rows: tuple, side: str) -> dict[str, torch.Tensor]:
        """Images of all aspect ratios, the one with the most tiles first."""
        most = len(self.ours.config.vision_config.supported_aspect_ratios)
        ratios = [[most - k % most for k in range(row.count("image"))] for row in rows]
        ids = [_ids(row, r, [TILED_IMAGE]) for r, row in enumerate(rows)]
        return batches.tiled(self.ours, *zip(ids, ratios, strict=True), side=side)


def _ids(row: list, number: int, placeholders: list[int]) -> list[int]:
    return [
        token
        for k, part in enumerate(row)
        for token in (
            placeholders if part == "image" else batches.tokens(part, seed=7 * number + k)
        )
    ]


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stock transformers' names in memory -> ours, written down apart from the tables of
    mllama.checkpoints.
    """
    weights = dict(weights)
    for kind in ("weight", "bias"):
        if (fused := weights.pop(f"head.attention.in_proj_{kind}", None)) is not None:
            weights |= {
                f"head.attention.{part}_proj.{kind}": piece
                for part, piece in zip("qkv", fused.chunk(3), strict=True)
            }
    if "model.language_model.norm.weight" in weights:
        prefixes = {  # of Llama-3.2-Vision alone
            "vision_model.": "vision_tower.",
            "multi_modal_projector.weight": "multi_modal_projector.linear.weight",
            "multi_modal_projector.bias": "multi_modal_projector.linear.bias",
        }
        return {
            _replaced(name.removeprefix("model."), prefixes): value
            for name, value in weights.items()
        }
    if "model.norm.weight" in weights:
        return {name.replace("model.", "language_model."): value for name, value in weights.items()}
    return {
        name if name.startswith("head.") else f"vision_tower.{name}": value
        for name, value in weights.items()
    }


def _replaced(name: str, prefixes: dict[str, str]) -> str:
    for prefix, other in prefixes.items():
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name


def of(theirs: PreTrainedModel) -> Pair:
    """The model and ours of its config and weights."""
    kind = theirs.config.model_type
    if kind == "siglip_vision_model":
        ours = SiglipModel(theirs.config)
    elif kind == "mllama":
        ours = MllamaForConditionalGeneration(theirs.config, reference="hf")
    else:
        ours = MllamaForConditionalGeneration(theirs.config)
    report = torch.nn.Module.load_state_dict(ours, renamed(theirs.state_dict()))
    assert not report.missing_keys and not report.unexpected_keys
    return Pair(ours.eval(), theirs)


def make(name: str, seed: int = 0, **options) -> Pair:
    """A pair of a model of stock's table."""
    return of(stock.make(name, seed, **options))


pair = functools.cache(make)


def with_inputs(name: str) -> tuple[Pair, dict[str, torch.Tensor]]:
    """A shared pair, and a batch of two rows of one length."""
    return pair(name), pair(name).inputs("equal rows")
