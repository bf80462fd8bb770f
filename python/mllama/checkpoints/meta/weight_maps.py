"""Maps between the tensors of Meta's Llama 3.x and Llama-3.2-Vision and the model's."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mllama.config.spec import ModelSpec, TiledVisionSpec
from mllama.weights.rows import Concat, Drop, Permute, Rename, Reshape, Row

ENCODER = "vision_model.vision_encoder."


def text_weight_map(spec: ModelSpec) -> list[Row]:
    """The map of a text model's tensors."""
    text = spec.text
    return [
        Rename("language_model.embed_tokens.weight", "tok_embeddings.weight"),
        *_outer_rows(""),
        *_self_rows("", text.num_attention_heads, text.num_key_value_heads),
    ]


def vision_weight_map(spec: ModelSpec) -> list[Row]:
    """The map of Llama-3.2-Vision's tensors."""
    text, vision = spec.text, spec.vision
    crossed = text.cross_attention_layers
    selves = [layer for layer in range(text.num_hidden_layers) if layer not in crossed]
    embeddings = ("text_model.tok_embeddings.weight", "text_model.learnable_embedding.weight")
    return [
        Concat(
            "language_model.embed_tokens.weight",
            embeddings,
            sizes=(text.vocab_size, text.extra_embeddings),
        ),
        *_outer_rows("text_model."),
        *_self_rows(
            "text_model.",
            text.num_attention_heads,
            text.num_key_value_heads,
            dict(enumerate(selves)),
        ),
        *_cross_rows(dict(enumerate(crossed))),
        *_encoder_rows(vision),
        Rename("multi_modal_projector.linear.*", "vision_model.vision_projection.*"),
    ]


def _outer_rows(prefix: str) -> list[Row]:
    return [
        Rename("language_model.norm.weight", f"{prefix}norm.weight"),
        Rename("lm_head.weight", f"{prefix}output.weight"),
        Drop(f"{prefix}rope.freqs"),
    ]


_EVERY_LAYER = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def _layer_rows(
    theirs: str, names: dict[str, str], steps: dict[str, tuple], index: dict[int, int] | None
) -> list[Row]:
    names = _EVERY_LAYER | names
    return [
        Rename(
            f"language_model.layers.{{}}.{ours}",
            f"{theirs}.{{}}.{name}",
            steps=steps.get(ours, ()),
            index=index,
        )
        for ours, name in ((f"{ours}.weight", f"{name}.weight") for ours, name in names.items())
    ]


def _self_rows(
    prefix: str, heads: int, kv_heads: int, index: dict[int, int] | None = None
) -> list[Row]:
    names = {f"self_attn.{kind}_proj": f"attention.w{kind}" for kind in "qkvo"}
    steps = {
        "self_attn.q_proj.weight": (Permute(heads),),
        "self_attn.k_proj.weight": (Permute(kv_heads),),
    }
    return _layer_rows(f"{prefix}layers", names, steps, index)


def _cross_rows(index: dict[int, int]) -> list[Row]:
    theirs = "text_model.cross_attention_layers"
    names = {
        f"cross_attn.{kind}_proj": f"attention.w{kind}" for kind in "qkvo"
    }  # without rotary positions, rows are not permuted
    names |= {f"cross_attn.{kind}_norm": f"attention.{kind}_norm" for kind in "qk"}
    gates = {"cross_attn_attn_gate": "gate_attn", "cross_attn_mlp_gate": "gate_ffwd"}
    return _layer_rows(theirs, names, {}, index) + [
        Rename(
            f"language_model.layers.{{}}.{ours}",
            f"{theirs}.{{}}.{name}",
            steps=(First(),),
            index=index,
        )
        for ours, name in gates.items()
    ]


def _encoder_rows(vision: TiledVisionSpec) -> list[Row]:
    width, channels, patch = vision.hidden_size, vision.num_channels, vision.patch_size
    ratios, tiles = tuple(map(tuple, vision.supported_aspect_ratios)), vision.max_num_tiles
    positions = (vision.image_size // patch) ** 2 + 1
    patches = Reshape((width, channels, patch, patch), (width, channels * patch**2))
    position = "vision_tower.gated_positional_embedding."
    rows = [
        Rename("vision_tower.class_embedding", f"{ENCODER}class_embedding"),
        Rename(
            "vision_tower.patch_embedding.weight",
            f"{ENCODER}conv1._linear.weight",
            steps=(patches,),
        ),
        Rename("vision_tower.layernorm_pre.*", f"{ENCODER}ln_pre.*"),
        Rename("vision_tower.layernorm_post.*", f"{ENCODER}ln_post.*"),
        Rename(
            f"{position}embedding", f"{ENCODER}positional_embedding", steps=(Resample(positions),)
        ),
        Rename(f"{position}gate", f"{ENCODER}gated_positional_embedding_gate", steps=(First(),)),
        Rename(
            f"{position}tile_embedding.weight",
            f"{ENCODER}gated_positional_embedding",
            steps=(Resample(positions), TileTable(ratios, tiles, positions, width)),
        ),
    ]
    for kind in ("pre", "post"):
        ours, theirs = (
            f"vision_tower.{kind}_tile_positional_embedding.",
            f"{ENCODER}{kind}_tile_pos_embed.",
        )
        rows.append(
            Rename(
                f"{ours}embedding.weight",
                f"{theirs}embedding",
                steps=(TileTable(ratios, tiles, 1, width),),
            )
        )
        rows.append(Rename(f"{ours}gate", f"{theirs}gate", steps=(First(),)))
    names = {f"self_attn.{kind}_proj.*": f"attn.w{kind}.*" for kind in "qkvo"}
    names |= {"mlp.fc1.*": "mlp.c_fc.*", "mlp.fc2.*": "mlp.c_proj.*"}
    names |= {"input_layernorm.*": "ln_1.*", "post_attention_layernorm.*": "ln_2.*"}
    for stack in ("transformer", "global_transformer"):
        ours, theirs = f"vision_tower.{stack}.layers.{{}}.", f"{ENCODER}{stack}.resblocks.{{}}."
        rows += [Rename(ours + name, theirs + other) for name, other in names.items()]
    rows += [
        Rename(ours + gate, theirs + gate, steps=(First(),)) for gate in ("gate_attn", "gate_ffn")
    ]
    return rows


@dataclass(frozen=True)
class First:
    """A gate is one number, which files may contain several times."""

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first element, as [1]."""
        return tensor.reshape(-1)[:1]

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """Unchanged."""
        return tensor


@dataclass(frozen=True)
class Resample:
    """Resample positions to another number of patches, as Meta's code does on loading: bilinear
    over the whole canvas.

    Attributes:
        positions: positions per tile, the class token's included.
    """

    positions: int

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """[file positions, width] or [tiles, tiles, file positions, width] -> the same with
        `positions`.
        """
        *tiles, given, width = tensor.shape
        if given == self.positions:
            return tensor
        old, new = math.isqrt(given - 1), math.isqrt(self.positions - 1)
        if old**2 != given - 1 or len(tiles) not in (0, 2):
            raise ValueError(
                f"must be positions of a square of patches and of a class token, not {given}"
            )
        rows, columns = tiles or (1, 1)
        grid = tensor[..., 1:, :].reshape(rows, columns, old, old, width).permute(4, 0, 2, 1, 3)
        canvas = grid.reshape(1, width, rows * old, columns * old)
        canvas = F.interpolate(
            canvas, (rows * new, columns * new), mode="bilinear", align_corners=True
        )
        grid = canvas.reshape(width, rows, new, columns, new).permute(1, 3, 2, 4, 0)
        return torch.cat((tensor[..., :1, :], grid.reshape(*tiles, new * new, width)), dim=-2)

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """Unchanged."""
        return tensor


@dataclass(frozen=True)
class TileTable:
    """Meta's embeddings by tile row and column <-> a table by aspect ratio, with row 0 for no image
    and zeros for unused tiles.

    Attributes:
        ratios: (rows, columns) of tiles for each row of the table, from row 1 on.
        tiles: maximum number of tiles per image.
        positions: positions per tile.
        width: width of an embedding.
    """

    ratios: tuple[tuple[int, int], ...]
    tiles: int
    positions: int
    width: int

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """[tiles, tiles, positions, width] -> [1 + ratios, tiles * positions * width]."""
        if tensor.shape != (self.tiles, self.tiles, self.positions, self.width):
            raise ValueError(f"must be {[self.tiles, self.tiles, self.positions, self.width]}")
        table = tensor.new_zeros(1 + len(self.ratios), self.tiles, self.positions, self.width)
        for row, (high, wide) in enumerate(self.ratios, start=1):
            table[row, : high * wide] = tensor[:high, :wide].flatten(0, 1)
        return table.flatten(1)

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse; rows and columns that no ratio uses are zeros.

        Raises:
            ValueError: the table has different embeddings for one tile of Meta's layout, as after
                training.
        """
        table = tensor.unflatten(1, (self.tiles, self.positions, self.width))
        written = tensor.new_zeros(self.tiles, self.tiles, self.positions, self.width)
        for row, (high, wide) in enumerate(self.ratios, start=1):
            written[:high, :wide] = table[row, : high * wide].unflatten(0, (high, wide))
        if not torch.equal(self.read(written), tensor):
            raise ValueError(
                "a tile has different embeddings in different aspect ratios: Meta's layout "
                "cannot hold that"
            )
        return written
