"""Meta's own folders: params.json, consolidated.*.pth and the names of Meta's reference code, for Llama 3.x and Llama-3.2-Vision."""

import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, MllamaConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from mllama.checkpoints.engine import Concat, Drop, Permute, Rename, Reshape, Row
from mllama.checkpoints.files import find_inside, listing, read_json
from mllama.checkpoints.formats import Opened
from mllama.checkpoints.sources import Header

PARAMS = "params.json"
# What params.json does not say of the vision tower: constants of Meta's code.
VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "patch_size": 14,
    "num_channels": 3,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
}
_NEW_ROWS = 8  # of learnable_embedding, which stand behind the vocabulary
_SPECIAL = 256  # special tokens, the last of the vocabulary
_ROPE_FACTOR_32 = ((2048, 16), (3072, 28))  # (dim, n_layers) of 1B and 3B; the others have 8, which Meta's code uses for all
_LARGEST = 2**31 - 1
_FINER = 4  # times more patches than the file has positions for, at most, are interpolated
_MAPPED = 2**26  # bytes read from a mapping before it is given back, or a 32nd of the files: mapping them again reads their pickles

_ENCODER = "vision_model.vision_encoder."
# The axis along which Meta's parallel layers cut a tensor; the tensors of no pattern are whole in every shard.
_CUT = (
    (0, re.compile(r"(.*\.)?(w[qkv13]|c_fc|_linear|vision_projection|output|tok_embeddings|learnable_embedding)\.(weight|bias)")),
    (1, re.compile(r"(.*\.)?(wo|w2|c_proj)\.weight")),
)


def open_meta(folder: str | Path) -> Opened:
    """A folder as Meta ships it: its config, and its tensors under Meta's names, parallel shards put together.

    Args:
        folder: with params.json and consolidated.pth, or consolidated.00.pth, consolidated.01.pth and so on.

    Raises:
        FileNotFoundError: no params.json, no weights, or a shard that is not there.
        ValueError: params.json or a shard is broken, is of no Llama 3, or the two do not fit each other.
    """
    folder = Path(folder)
    params = _Params(find_inside(folder, PARAMS))
    source = MetaSource(str(folder), _shards(folder))
    text = _text_arguments(params)
    return _open_vision(params, text, source) if params.has_vision else _open_text(params, text, source)


def _open_text(params: "_Params", text: dict[str, Any], source: "MetaSource") -> Opened:
    headers = source.headers()
    _check_fit(params.path, headers, _text_shapes("", text), {"layers": text["num_hidden_layers"]})
    tied = "output.weight" not in headers or source.same("output.weight", "tok_embeddings.weight")
    config = LlamaConfig(**text, tie_word_embeddings=tied)
    return Opened(config, text_table(config), source, _generation(config))


def _open_vision(params: "_Params", text: dict[str, Any], source: "MetaSource") -> Opened:
    layers, tiles = text["num_hidden_layers"], params.count("vision_max_num_chunks", 4)
    headers = source.headers()
    width, dim = VISION["hidden_size"], text["hidden_size"]
    states = 1 + len(VISION["intermediate_layers_indices"])
    fusion = _fusion(layers, params.count("vision_num_cross_attention_layers"))
    _check_fit(
        params.path,
        headers,
        _text_shapes("text_model.", text)
        | {
            "text_model.learnable_embedding.weight": (_NEW_ROWS, dim),
            f"{_ENCODER}conv1._linear.weight": (width, VISION["num_channels"] * VISION["patch_size"] ** 2),
            f"{_ENCODER}positional_embedding": (None, width),
            f"{_ENCODER}gated_positional_embedding": (tiles, tiles, None, width),
            f"{_ENCODER}transformer.resblocks.0.mlp.c_fc.weight": (VISION["intermediate_size"], width),
            "vision_model.vision_projection.weight": (dim, states * width),
        },
        {
            "text_model.layers": layers,
            "text_model.cross_attention_layers": len(fusion),
            f"{_ENCODER}transformer.resblocks": VISION["num_hidden_layers"],
            f"{_ENCODER}global_transformer.resblocks": VISION["num_global_layers"],
        },
    )
    size = params.count("vision_chunk_size")
    patches, positions = (size // VISION["patch_size"]) ** 2, headers[f"{_ENCODER}positional_embedding"].shape[0] - 1
    if not 0 < patches <= _FINER * positions:
        raise ValueError(f"{params.path}: vision_chunk_size {size} makes {patches} patches; the shards have positions for {positions}")
    crossed = [layer + place for place, layer in enumerate(sorted(fusion))]
    config = MllamaConfig(
        text_config=MllamaTextConfig(**text | {"num_hidden_layers": layers + len(crossed)}, cross_attention_layers=crossed).to_dict(),
        vision_config=MllamaVisionConfig(
            **VISION,
            image_size=size,
            vision_output_dim=states * width,
            max_num_tiles=tiles,
            supported_aspect_ratios=[[h, w] for h in range(1, tiles + 1) for w in range(1, tiles + 1) if h * w <= tiles],
        ).to_dict(),
        image_token_index=text["vocab_size"],  # the first of the new rows
    )
    return Opened(config, vision_table(config), source, _generation(config.text_config))


def _fusion(self_layers: int, cross_layers: int) -> range:
    """Meta's schedule, from the last one on: the self-attention layers that a cross-attention layer stands before, evenly spread."""
    return range(self_layers - 1, -1, -math.ceil(self_layers / cross_layers))[:cross_layers]


def _text_arguments(params: "_Params") -> dict[str, Any]:
    """The arguments of transformers' config of the decoder, cross-attention layers left out."""
    dim, layers, heads = (params.count(name) for name in ("dim", "n_layers", "n_heads"))
    kv_heads, vocabulary = params.count("n_kv_heads", heads), params.count("vocab_size")
    if dim % (2 * heads) or heads % kv_heads:
        raise ValueError(f"{params.path}: dim {dim}, n_heads {heads} and n_kv_heads {kv_heads} do not divide one another")
    rope = {"rope_type": "default", "rope_theta": params.number("rope_theta")}
    scaled = params.content.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise ValueError(f"{params.path}: use_scaled_rope must be true or false, got {scaled!r}")
    if scaled:
        rope |= {
            "rope_type": "llama3",
            "factor": 32.0 if (dim, layers) in _ROPE_FACTOR_32 else 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    inner = int(2 * 4 * dim / 3)
    if params.content.get("ffn_dim_multiplier") is not None:
        inner = int(params.number("ffn_dim_multiplier") * inner)
    multiple = params.count("multiple_of", 256)
    return {
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": math.ceil(inner / multiple) * multiple,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": params.number("norm_eps"),
        "rope_parameters": rope,
        "max_position_embeddings": 131072 if scaled else 8192,
        **_special_ids(vocabulary),
    }


def _special_ids(vocabulary: int) -> dict[str, Any]:
    """Meta's special tokens as a config has them; none where the vocabulary has no room for them beside the single bytes."""
    if vocabulary < 256 + _SPECIAL:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    first = vocabulary - _SPECIAL
    # Meta stops at end of text, end of message and end of turn, whatever the model.
    return {"bos_token_id": first, "eos_token_id": [first + 1, first + 8, first + 9], "pad_token_id": first + 4}


def _generation(config: LlamaConfig | MllamaTextConfig) -> dict[str, Any] | None:
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return ids if config.eos_token_id is not None else None


def _text_shapes(prefix: str, text: dict[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """Tensors that show every size of the decoder."""
    dim, vocabulary = text["hidden_size"], text["vocab_size"]
    kv_dim = dim // text["num_attention_heads"] * text["num_key_value_heads"]
    return {
        f"{prefix}tok_embeddings.weight": (vocabulary, dim),
        f"{prefix}layers.0.attention.wq.weight": (dim, dim),
        f"{prefix}layers.0.attention.wk.weight": (kv_dim, dim),
        f"{prefix}layers.0.feed_forward.w1.weight": (text["intermediate_size"], dim),
    }


def _check_fit(path: Path, headers: Mapping[str, Header], shapes: dict[str, tuple[int | None, ...]], counts: dict[str, int]) -> None:
    """Before anything of the sizes that params.json gives is built: the shards must have them.

    Args:
        shapes: {tensor: its shape}, None for a size that may be any.
        counts: {name of a list of layers: how many it has}.
    """
    wrong = []
    for name, shape in shapes.items():
        found = headers[name].shape if name in headers else None
        if found is None:
            wrong.append(f"there is no {name}")
        elif len(found) != len(shape) or any(size not in (None, given) for size, given in zip(shape, found, strict=True)):
            wrong.append(f"{name} is {list(found)}, not {str(list(shape)).replace('None', 'any')}")
    for stem, count in counts.items():
        numbers = {name[len(stem) + 1 :].split(".")[0] for name in headers if name.startswith(f"{stem}.")}
        if len(numbers) != count:
            wrong.append(f"there are {len(numbers)} {stem}, not {count}")
    if wrong:
        raise ValueError(f"{path} and the shards beside it do not fit each other: {'; '.join(wrong)}")


class _Params:
    """The content of params.json, its numbers checked one by one."""

    def __init__(self, path: Path):
        self.path = path
        content = read_json(path)
        inner = content.get("model", content)
        if not isinstance(inner, dict):
            raise ValueError(f"{path}: model must be an object, got {inner!r}")
        self.content = inner

    @property
    def has_vision(self) -> bool:
        """Whether it is of Llama-3.2-Vision: Meta's code asks no more."""
        return self.content.get("vision_chunk_size", -1) != -1

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1. Raises ValueError for another thing, and for none without a default."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
            raise ValueError(f"{self.path}: {name} must be a whole number from 1 to {_LARGEST}, got {str(value)[:40]!r}")
        return value

    def number(self, name: str) -> float:
        """A number above 0. Raises ValueError for another thing, and for none."""
        value = self._get(name, None)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= _LARGEST:
            raise ValueError(f"{self.path}: {name} must be a number above 0 and at most {_LARGEST}, got {str(value)[:40]!r}")
        return float(value)

    def _get(self, name: str, default: int | None) -> Any:
        value = self.content.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.path} has no {name}; it is not of a Llama 3")
        return value


def text_table(config: LlamaConfig) -> list[Row]:
    """Meta's names of a text model's tensors."""
    return [
        Rename("language_model.embed_tokens.weight", "tok_embeddings.weight"),
        *_outer_rows(""),
        *_self_rows("", config.num_attention_heads, config.num_key_value_heads),
    ]


def vision_table(config: MllamaConfig) -> list[Row]:
    """Meta's names of the tensors of Llama-3.2-Vision."""
    text, vision = config.text_config, config.vision_config
    crossed = text.cross_attention_layers
    selves = [layer for layer in range(text.num_hidden_layers) if layer not in crossed]
    embeddings = ("text_model.tok_embeddings.weight", "text_model.learnable_embedding.weight")
    return [
        Concat("language_model.embed_tokens.weight", embeddings, sizes=(text.vocab_size, _NEW_ROWS)),
        *_outer_rows("text_model."),
        *_self_rows("text_model.", text.num_attention_heads, text.num_key_value_heads, dict(enumerate(selves))),
        *_cross_rows(dict(enumerate(crossed))),
        *_tower_rows(vision),
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


def _layer_rows(theirs: str, names: dict[str, str], steps: dict[str, tuple], index: dict[int, int] | None) -> list[Row]:
    names = _EVERY_LAYER | names
    return [
        Rename(f"language_model.layers.{{}}.{ours}", f"{theirs}.{{}}.{name}", steps=steps.get(ours, ()), index=index)
        for ours, name in ((f"{ours}.weight", f"{name}.weight") for ours, name in names.items())
    ]


def _self_rows(prefix: str, heads: int, kv_heads: int, index: dict[int, int] | None = None) -> list[Row]:
    names = {f"self_attn.{kind}_proj": f"attention.w{kind}" for kind in "qkvo"}
    steps = {"self_attn.q_proj.weight": (Permute(heads),), "self_attn.k_proj.weight": (Permute(kv_heads),)}
    return _layer_rows(f"{prefix}layers", names, steps, index)


def _cross_rows(index: dict[int, int]) -> list[Row]:
    theirs = "text_model.cross_attention_layers"
    names = {f"cross_attn.{kind}_proj": f"attention.w{kind}" for kind in "qkvo"}  # no rotation here, so nothing to permute
    names |= {f"cross_attn.{kind}_norm": f"attention.{kind}_norm" for kind in "qk"}
    gates = {"cross_attn_attn_gate": "gate_attn", "cross_attn_mlp_gate": "gate_ffwd"}
    return _layer_rows(theirs, names, {}, index) + [
        Rename(f"language_model.layers.{{}}.{ours}", f"{theirs}.{{}}.{name}", steps=(First(),), index=index) for ours, name in gates.items()
    ]


def _tower_rows(vision: MllamaVisionConfig) -> list[Row]:
    width, channels, patch = vision.hidden_size, vision.num_channels, vision.patch_size
    ratios, tiles = tuple(map(tuple, vision.supported_aspect_ratios)), vision.max_num_tiles
    positions = (vision.image_size // patch) ** 2 + 1
    patches = Reshape((width, channels, patch, patch), (width, channels * patch**2))
    position = "vision_tower.gated_positional_embedding."
    rows = [
        Rename("vision_tower.class_embedding", f"{_ENCODER}class_embedding"),
        Rename("vision_tower.patch_embedding.weight", f"{_ENCODER}conv1._linear.weight", steps=(patches,)),
        Rename("vision_tower.layernorm_pre.*", f"{_ENCODER}ln_pre.*"),
        Rename("vision_tower.layernorm_post.*", f"{_ENCODER}ln_post.*"),
        Rename(f"{position}embedding", f"{_ENCODER}positional_embedding", steps=(Resample(positions),)),
        Rename(f"{position}gate", f"{_ENCODER}gated_positional_embedding_gate", steps=(First(),)),
        Rename(
            f"{position}tile_embedding.weight",
            f"{_ENCODER}gated_positional_embedding",
            steps=(Resample(positions), TileTable(ratios, tiles, positions, width)),
        ),
    ]
    for kind in ("pre", "post"):
        ours, theirs = f"vision_tower.{kind}_tile_positional_embedding.", f"{_ENCODER}{kind}_tile_pos_embed."
        rows.append(Rename(f"{ours}embedding.weight", f"{theirs}embedding", steps=(TileTable(ratios, tiles, 1, width),)))
        rows.append(Rename(f"{ours}gate", f"{theirs}gate", steps=(First(),)))
    names = {f"self_attn.{kind}_proj.*": f"attn.w{kind}.*" for kind in "qkvo"}
    names |= {"mlp.fc1.*": "mlp.c_fc.*", "mlp.fc2.*": "mlp.c_proj.*"}
    names |= {"input_layernorm.*": "ln_1.*", "post_attention_layernorm.*": "ln_2.*"}
    for stack in ("transformer", "global_transformer"):
        ours, theirs = f"vision_tower.{stack}.layers.{{}}.", f"{_ENCODER}{stack}.resblocks.{{}}."
        rows += [Rename(ours + name, theirs + other) for name, other in names.items()]
    rows += [Rename(ours + gate, theirs + gate, steps=(First(),)) for gate in ("gate_attn", "gate_ffn")]
    return rows


@dataclass(frozen=True)
class First:
    """A gate is one number; files may hold it several times."""

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first element, as [1]."""
        return tensor.reshape(-1)[:1]

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return tensor


@dataclass(frozen=True)
class Resample:
    """Positions for another number of patches than the file has, as Meta's code makes them when it loads: bilinear over the whole canvas.

    Attributes:
        positions: per tile, the class token's included.
    """

    positions: int

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """[positions of the file, width], or [tiles, tiles, positions of the file, width] -> the same with `positions`."""
        *tiles, given, width = tensor.shape
        if given == self.positions:
            return tensor
        old, new = math.isqrt(given - 1), math.isqrt(self.positions - 1)
        if old**2 != given - 1 or len(tiles) not in (0, 2):
            raise ValueError(f"must be positions of a square of patches and of a class token, not {given}")
        rows, columns = tiles or (1, 1)
        grid = tensor[..., 1:, :].reshape(rows, columns, old, old, width).permute(4, 0, 2, 1, 3)
        canvas = grid.reshape(1, width, rows * old, columns * old)
        canvas = F.interpolate(canvas, (rows * new, columns * new), mode="bilinear", align_corners=True)
        grid = canvas.reshape(width, rows, new, columns, new).permute(1, 3, 2, 4, 0)
        return torch.cat((tensor[..., :1, :], grid.reshape(*tiles, new * new, width)), dim=-2)

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return tensor


@dataclass(frozen=True)
class TileTable:
    """Embeddings by row and column of a tile, against a table by aspect ratio: row 0 for no picture, zeros for the tiles not used.

    Attributes:
        ratios: (tiles high, tiles wide) of each row of the table, from row 1 on.
        tiles: of a picture at most.
        positions: per tile.
        width: of an embedding.
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
        """The reverse; rows and columns that no ratio reaches are zeros.

        Raises:
            ValueError: the table has several embeddings for a tile that Meta's layout has once, as after training.
        """
        table = tensor.unflatten(1, (self.tiles, self.positions, self.width))
        written = tensor.new_zeros(self.tiles, self.tiles, self.positions, self.width)
        for row, (high, wide) in enumerate(self.ratios, start=1):
            written[:high, :wide] = table[row, : high * wide].unflatten(0, (high, wide))
        if not torch.equal(self.read(written), tensor):
            raise ValueError("a tile has other embeddings in one aspect ratio than in another: Meta's layout cannot hold that")
        return written


class MetaSource:
    """The tensors of consolidated.*.pth; of parallel shards the parts are put together, one tensor at a time.

    Only plain tensors are read from the pickles in these files; whatever else they hold is refused and never tried another way.
    """

    def __init__(self, where: str, paths: Sequence[Path]):
        """
        Args:
            where: the folder, for errors.
            paths: the shards, in order.

        Raises:
            ValueError: a shard holds something else, or they are not parts of one model.
        """
        self.where = where
        self.mapped = len(paths) == 1  # parts are put together in memory of their own
        self._paths = tuple(paths)
        self._open: dict[Path, dict[str, torch.Tensor]] = {}
        self._read, self._keep = 0, max(_MAPPED, sum(path.stat().st_size for path in self._paths) // 32)
        shards = [{name: Header(tuple(part.shape), part.dtype) for name, part in self._parts(path).items()} for path in self._paths]
        for path, headers in zip(self._paths[1:], shards[1:], strict=True):
            if other := sorted(name for name in headers.keys() | shards[0].keys() if headers.get(name) != shards[0].get(name)):
                raise ValueError(f"{path} is no part of the same model as {self._paths[0].name}: they differ in {listing(other)}")
        self._headers = {name: self._whole(name, header) for name, header in shards[0].items()}

    def headers(self) -> dict[str, Header]:
        """Every tensor's shape and type, parts put together, in the order of the files."""
        return self._headers

    def read(self, name: str) -> torch.Tensor:
        """One tensor: of a single file a view of its mapping, which is given back now and then; else a tensor of its own."""
        axis = _axis(name)
        parts = [self._parts(path)[name] for path in (self._paths if axis is not None else self._paths[:1])]
        tensor = torch.cat(parts, axis) if len(parts) > 1 else parts[0] if self.mapped else parts[0].clone()
        self._read += tensor.nbytes
        if self._read > self._keep:
            self.close()
        return tensor

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors, cut along the same axis, are equal."""
        if self._headers[name] != self._headers[other]:
            return False
        pairs = ((self._parts(path)[name], self._parts(path)[other]) for path in self._paths)
        equal = all(torch.equal(one[:1], two[:1]) and torch.equal(one, two) for one, two in pairs)  # most differ in the first row
        self.close()
        return equal

    def close(self) -> None:
        """Let go of the mapped files. Idempotent."""
        self._open, self._read = {}, 0

    def __enter__(self) -> "MetaSource":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _parts(self, path: Path) -> dict[str, torch.Tensor]:
        if path not in self._open:
            self._open[path] = _load(path)
        return self._open[path]

    def _whole(self, name: str, part: Header) -> Header:
        axis = _axis(name)
        shape = [size * len(self._paths) if place == axis else size for place, size in enumerate(part.shape)]
        return Header(tuple(shape), part.dtype)


def _axis(name: str) -> int | None:
    return next((axis for axis, pattern in _CUT if pattern.fullmatch(name)), None)


def _shards(folder: Path) -> list[Path]:
    """The folder's weight files, in order.

    Raises:
        FileNotFoundError: there are none, or one is missing.
        ValueError: other names than Meta gives.
    """
    names = sorted(path.name for path in folder.glob("consolidated*.pth"))
    if not names:
        raise FileNotFoundError(f"{folder} has {PARAMS} but no consolidated.00.pth")
    if names != ["consolidated.pth"]:
        numbered = [f"consolidated.{number:02d}.pth" for number in range(len(names))]
        if missing := [name for name in numbered if name not in names]:
            raise FileNotFoundError(f"{folder} has {listing(names)}, but no {listing(missing)}")
    return [find_inside(folder, name) for name in names]


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth, mapped.

    Raises:
        ValueError: it is no archive of torch.save's, holds something else than tensors by name, or more of them than its size has room for.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (?!was )(\S+)", str(error))
        raise ValueError(f"{path} holds something else than tensors{f' ({found[1]})' if found else ''}, and is not read") from error
    except Exception as error:  # of a broken file anything may come
        raise ValueError(f"{path} is no archive that torch.save wrote: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) and _is_plain(value) for name, value in content.items()):
        raise ValueError(f"{path} must hold dense tensors by their names, and nothing else")
    # Two names may share their memory, as tied tensors do; many could fill any memory from a small file.
    if sum(tensor.nbytes for name, tensor in content.items() if not name.endswith("output.weight")) > path.stat().st_size:
        raise ValueError(f"{path} claims more tensors than its {path.stat().st_size} bytes can hold")
    return {name: tensor.detach() for name, tensor in content.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
