"""Images of prompts: each is encoded by itself, once, so that what the decoder gets of it does not
depend on others.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mllama.config.features import choose_features
from mllama.device import instruction_set
from mllama.fusion.base import ModelInputs, share_evenly
from mllama.nn.kv_cache import CACHE_DTYPES, KVCache
from mllama.runtime.fingerprint import hash_tensors
from mllama.runtime.image_cache import Entry, ImageCache
from mllama.runtime.progress import IMAGE, Stages

IMAGE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class ImageInput(NamedTuple):
    """One image.

    Attributes:
        tensors: the encoder's inputs, those of a batch of one image.
        key: hash of these and of the model's settings.
    """

    tensors: dict[str, torch.Tensor]
    key: bytes


class ImageReader:
    """Computes what a decoder needs of images: features, or, for cross-attention layers, their keys
    and values in all these layers.

    Args:
        model: a `VisionLanguageModel`.
        cache: where it is kept.
        kv_cache: what keys and values are stored in, as `Session` takes it.
    """

    def __init__(self, model: Any, cache: ImageCache, kv_cache: str | None = None):
        self.model, self.cache, self._kv_cache = model, cache, kv_cache
        self.layers = model.spec.text.cross_attention_layers
        self.stages = Stages()  # is told of images that are not in memory
        self._encoded = False  # whether the last one was, and did not come from a file
        self.forget()

    def forget(self) -> None:
        """Forget the last keys and values, which a session's own cache shares."""
        self._last: tuple[tuple, Any] | None = None  # the names of entries, and what `keys` gave

    def split(
        self, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[list[ImageInput], list[list[ImageInput]] | None]:
        """The images of a batch in order, and those of each row; None if only the model can tell.

        Raises:
            TypeError, ValueError, IndexError: as the encoder's `check`; there are more or fewer
                rows of images than of text; the model takes no images.
        """
        ids, spec = inputs["input_ids"], self.model.spec
        given = {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
        if not given:
            return [], [[] for _ in ids]
        self._check(given, len(ids))
        pixels = given["pixel_values"]
        if spec.has_tiles:
            each = [pixels.shape[1]] * len(ids)
            given = {name: value.flatten(0, 1).unsqueeze(1) for name, value in given.items()}
        else:
            each = self._count(ids, len(pixels))
        # given: [images, 1, ...] of tiled images, else [images, ...]
        features, numbers = choose_features(spec), arithmetic(pixels.device.type)
        settings = f"{spec} {features} {self.model.reference} {numbers}".encode()
        each_image = [
            {name: value[i : i + 1] for name, value in given.items()}
            for i in range(len(given["pixel_values"]))
        ]
        flat = [ImageInput(tensors, hash_tensors(settings, tensors)) for tensors in each_image]
        if each is None:
            return flat, [flat] if len(ids) == 1 else None
        rest = iter(flat)
        return flat, [[next(rest) for _ in range(count)] for count in each]

    def features(self, images: Sequence[ImageInput]) -> torch.Tensor:
        """[images, patches, hidden]."""
        self.cache.attach(self.model, of_features=True)
        entries = self._find(
            images, [image.key for image in images], lambda i: (self._encode(images[i]),)
        )
        return torch.cat([features for (features,) in entries])

    def replace_pixels(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Arguments of `forward` with image_features in place of pixel_values.

        Raises:
            TypeError, ValueError, IndexError: as `split`.
        """
        images, _ = self.split(inputs)
        features = self.features(images)
        if self.model.spec.has_tiles:  # [rows * images, tiles * patches, hidden]
            features = features.unflatten(0, (len(inputs["input_ids"]), -1)).flatten(1, 2)
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        return rest | {"image_features": features}

    def keys(
        self, rows: Sequence[Sequence[ImageInput]], mask: torch.Tensor | None
    ) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], torch.Tensor | None]:
        """Keys and values of rows with the same number of images, as `KVCache.set_image_keys`
        takes them, and their tile_mask.

        Args:
            rows: the images of each row.
            mask: cross_attention_mask [rows, tokens, images, tiles].
        """
        if not rows[0]:
            self.forget()
            return {}, None
        images = [image for row in rows for image in row]
        tiles = self._tiles(rows, mask)  # (rows, images, tiles)
        own = tiles.flatten(0, 1)
        names = [
            hashlib.blake2b(
                image.key + bytes(used.tolist()) + str(self._kv_cache).encode(), digest_size=32
            ).digest()
            for image, used in zip(images, own, strict=True)
        ]
        if self._last is not None and self._last[0] == (len(rows), names):
            return self._last[1]
        self.cache.attach(self.model)
        entries = self._find(images, names, lambda i: self._keys_of(images[i], own[i]))
        shown = tiles.any(0)  # (images, tiles): a row without a tile's keys has zeros there
        entries = [
            tuple(_spread(one, used, wanted) for one in entry)
            for entry, used, wanted in zip(entries, own, shown.repeat(len(rows), 1), strict=True)
        ]
        joined = []
        for parts in zip(*entries, strict=True):
            each = [parts[i : i + len(rows[0])] for i in range(0, len(parts), len(rows[0]))]
            joined.append(_join([_join(row, 2) for row in each], 0))  # (rows, kv_heads, keys, D)
        pairs = zip(joined[::2], joined[1::2], strict=True)
        found = dict(zip(self.layers, pairs, strict=True)), shown.flatten()
        self._last = (len(rows), names), found
        return found

    def _check(self, given: Mapping[str, torch.Tensor], rows: int) -> None:
        spec, pixels = self.model.spec, given["pixel_values"]
        if spec.encoder is None:
            raise ValueError("pixel_values must be None: this model takes no images")
        if spec.has_tiles:
            self.model.vision_tower.check(*(given.get(name) for name in IMAGE_INPUTS))
            if len(pixels) != rows:
                raise ValueError(
                    f"pixel_values must have {rows} rows, one per row of text, got {len(pixels)}"
                )
            return
        if len(given) > 1:
            raise ValueError(f"{[*given][1]} must be None: this model does not read it")
        self.model.vision_tower.check(pixels)
        if self.layers:
            share_evenly(len(pixels), rows)

    def _count(self, ids: torch.Tensor, images: int) -> list[int] | None:
        """Images of each row, for images without tiles; None if only the model can tell."""
        spec, rows = self.model.spec, len(ids)
        if not self.layers and spec.image_token_index is not None:
            places = (ids == spec.image_token_index).sum(1)  # (rows,)
            if places.any():
                each = (places // spec.tokens_per_image).tolist()
                return each if sum(each) == images else None
        evenly = bool(self.layers) or self.model.fusion.placeholders_per_image == 0
        return [images // rows] * rows if evenly and images % rows == 0 else None

    def _find(self, images: Sequence[ImageInput], names: Sequence[bytes], compute) -> list[Entry]:
        """Entries by name; one of several equal images is computed."""
        found: dict[bytes, Entry] = {}
        missing = {name for name in names if name not in self.cache}
        if missing:
            self.stages.begin(IMAGE, len(missing))
        for index, name in enumerate(names):
            if name not in found:
                self._encoded = False
                found[name] = self.cache.find(name, lambda index=index: compute(index))
                if name in missing:
                    self.stages.advance(1, computed=self._encoded)
        return [found[name] for name in names]

    def _encode(self, image: ImageInput) -> torch.Tensor:
        """[1, patches, hidden]; of a tiled image [1, tiles * patches, hidden]."""
        self._encoded = True
        return self.model.encode_images(ModelInputs(**image.tensors))[0]

    def _tiles(
        self, rows: Sequence[Sequence[ImageInput]], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """bool [rows, images, tiles] on the CPU: tiles whose keys are needed, at least one of each
        image. As `cross_context`, which sees the whole batch.
        """
        spec, shape = self.model.spec, (len(rows), len(rows[0]))
        most = spec.vision.max_num_tiles if spec.has_tiles else 1
        tiles = torch.ones(*shape, most, dtype=torch.bool, device="cpu")
        masks = [image.tensors.get("aspect_ratio_mask") for row in rows for image in row]
        if mask is None or self.model.reference != "meta" or masks[0] is None:
            return tiles
        tiles = torch.cat(masks).cpu().view(tiles.shape) != 0  # type: ignore[arg-type]
        if mask.shape[2:] == tiles.shape[1:]:  # else the model rejects it
            tiles |= (mask != 0).any(1).cpu()
        tiles[..., 0] |= ~tiles.any(-1)
        return tiles

    def _keys_of(self, image: ImageInput, tiles: torch.Tensor) -> Entry:
        """Keys and values of an image's tiles, of one layer after the other, as they are stored."""
        decoder = self.model.language_model
        features = self._encode(image)
        embedded = decoder.embed_tokens(torch.zeros(1, 1, dtype=torch.long, device=features.device))
        features = features.to(embedded.dtype).unflatten(1, (len(tiles), -1))
        features = features[:, tiles].flatten(1, 2)  # (1, keys, hidden)
        dtype = None if self._kv_cache is None else CACHE_DTYPES[self._kv_cache]
        stored = KVCache(len(decoder.layers), dtype=dtype)
        for layer in self.layers:
            stored.update_cross(layer, *decoder.layers[layer].cross_attn.keys_values(features))
        return tuple(one.contiguous() for pair in stored.image_keys().values() for one in pair)


def arithmetic(device: str) -> tuple:
    """What rounds a model's values beside its weights."""
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return instruction_set(device), cast, torch.get_float32_matmul_precision()


def _spread(keys: torch.Tensor, own: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """[1, kv_heads, keys of own tiles, D] -> those of the wanted tiles, zeros where it has none."""
    if torch.equal(own, wanted):
        return keys
    each = keys.unflatten(2, (int(own.sum()), -1))  # (1, kv_heads, own tiles, tokens, D)
    spread = each.new_zeros(*each.shape[:2], int(wanted.sum()), *each.shape[3:])
    spread[:, :, own[wanted]] = each
    return spread.flatten(2, 3)


def _join(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """torch.cat, without a copy of one tensor alone."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
