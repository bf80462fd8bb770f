"""Prefill: the passes that put prompts into a KV cache. They do not compute again what the cache
has already, and compute once what the rows of a batch share.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from mllama.fusion.base import ModelInputs
from mllama.fusion.cross_attention import check_visible
from mllama.nn.kv_cache import CACHE_DTYPES, KVCache
from mllama.runtime.image_cache import ImageCache
from mllama.runtime.images import ImageInput, ImageReader
from mllama.runtime.prefix import Prompt, Reuse, find_reuse
from mllama.runtime.progress import PROMPT, Stages

Inputs = Mapping[str, torch.Tensor]
# Fewer shared ids and visual tokens are computed with every row: another pass reads all weights.
MIN_SHARED = 16


class PromptCache:
    """A KV cache and the prompt that is in it.

    Args:
        model: a `VisionLanguageModel` in eval mode.
        images: where images' features, or keys and values, are kept.
        kv_cache: what keys and values are stored in, as `Session` takes it.
        chunk_size: tokens of a pass, where the model permits chunks.
    """

    def __init__(self, model: Any, images: ImageCache, kv_cache: str | None, chunk_size: int):
        self.model, self._chunk_size = model, chunk_size
        self._reader = ImageReader(model, images, kv_cache)
        self._dtype = None if kv_cache is None else CACHE_DTYPES[kv_cache]
        self.drop()

    def drop(self) -> None:
        """Forget the prompt and release its memory."""
        layers = self.model.spec.text.num_hidden_layers
        self.cache = KVCache(layers, dtype=self._dtype)
        self._reader.forget()
        self._forget()

    def prefill(self, inputs: Inputs, stages: Stages) -> tuple[torch.Tensor, int]:
        """Compute what is new of the prompts.

        Args:
            stages: is told of images and of passes.
            inputs: as `Session.generate` takes them, on the model's device; without an
                attention_mask if nothing is padded.

        Returns:
            The last logits, [B, V], and how many leading ids of every row were in the cache.
        """
        self._stages = self._reader.stages = stages
        self.model.read_again()
        inputs = self._with_whole_mask(inputs)
        images, rows = self._reader.split(inputs)
        if len(inputs["input_ids"]) == 1 and "attention_mask" not in inputs:
            return self._prefill_row(inputs, images)  # type: ignore[return-value]
        shared = None if rows is None else self._find_shared(inputs, rows)
        if shared is None:
            return self._prefill_rows(inputs, images, rows), 0
        assert rows is not None
        return self._prefill_shared(inputs, rows, shared)

    @property
    def ids(self) -> list[int]:
        """What is in the cache of a single row; of several rows nothing."""
        return [] if self._row is None else self._row.ids

    def append(self, ids: torch.Tensor) -> torch.Tensor:
        """Put ids [B, T] behind the prompts; return their logits, [B, T, V]."""
        logits = self._pass(ids, {}, keep=ids.shape[1])
        if self._row is not None:
            self._row.ids.extend(ids[0].tolist())
        return logits

    def next_inputs(self, tokens: torch.Tensor) -> ModelInputs:
        """The pass that would append a token to every row, int64 [B]."""
        return self._inputs(tokens[:, None], {}, keep=1)

    def note(self, tokens: list[int]) -> None:
        """Say which tokens, one per row, a captured pass has put behind the prompts."""
        if self._row is not None:
            self._row.ids.extend(tokens)

    def drop_last(self, count: int) -> None:
        """Take back the last `count` ids that were put behind the prompts."""
        if count:
            if self._row is not None:  # first: `restore` crops the cache to them
                del self._row.ids[-count:]
            self.cache.crop(self.cache.length - count)

    def finish(self, keep_buffers: bool = False) -> None:
        """After the last token. What the rows of a batch share is left, as one row; `keep_buffers`
        leaves the memory of a batch that shares nothing to the next one.
        """
        if self._row is not None:
            self.cache.crop(self.cache.num_prefix_tokens + len(self._row.ids))  # of what ran ahead
            return
        if self._shared is None and keep_buffers:
            self.cache.reset()
            self._reader.forget()
            self._forget()
            return
        if self._shared is None:
            self.drop()
            return
        row, start = self._shared
        self.cache.reorder(torch.tensor([row]))
        self.cache.crop(self.cache.num_prefix_tokens + len(start.ids))
        self._forget()
        self._row = start

    def restore(self) -> None:
        """After an interrupted pass, crop the cache to what is complete."""
        if self._row is None or not self._row.ids:
            self.drop()
        else:
            self.cache.crop(self.cache.num_prefix_tokens + len(self._row.ids))

    def _forget(self) -> None:
        self._row: Prompt | None = Prompt([], [])  # in the cache; None: those of a batch
        self._shared: tuple[int, Prompt] | None = None  # a batch's row that begins with it
        self._masks: dict[str, torch.Tensor] = {}  # of the prompts in the cache

    def _with_whole_mask(self, inputs: Inputs) -> Inputs:
        """The inputs with a cross_attention_mask for all ids, its last row repeated.

        Raises:
            ValueError: it has another shape, or hides every image from a placeholder.
        """
        ids, mask = inputs["input_ids"], inputs.get("cross_attention_mask")
        if mask is None:
            return inputs
        if mask.dim() != 4 or len(mask) != len(ids) or not mask.shape[1]:
            raise ValueError(
                f"cross_attention_mask must be [{len(ids)}, tokens, images, tiles], "
                f"got {list(mask.shape)}"
            )
        check_visible(mask, self.model.fusion.find_placeholders(ids))
        rows = torch.arange(ids.shape[1], device=mask.device).clamp(max=mask.shape[1] - 1)
        return {**inputs, "cross_attention_mask": mask[:, rows]}

    def _prefill_row(
        self, inputs: Inputs, images: list[ImageInput], logits: bool = True
    ) -> tuple[torch.Tensor | None, int]:
        """`prefill` of one row without padding; all of it may be in the cache where no logits are
        requested.
        """
        ids, mask = inputs["input_ids"], inputs.get("cross_attention_mask")
        prompt = Prompt(ids[0].tolist(), [image.key for image in images], mask)
        # The last id is computed for its logits.
        reuse = self._cut(prompt if logits else prompt._replace(ids=[*prompt.ids, -1]))
        given: dict[str, torch.Tensor] = {}
        if self._reader.layers:
            self.cache.set_image_keys(*self._reader.keys([images], mask))
            self._row = self._row._replace(images=prompt.images)  # type: ignore[union-attr]
        elif reuse.images < len(images):
            given["image_features"] = self._reader.features(images[reuse.images :])
        if self.model.spec.bidirectional_prefix:
            given["token_type_ids"] = inputs["token_type_ids"][:, reuse.length :]
        self._masks = {} if mask is None else {"cross_attention_mask": mask}
        result, total = None, ids.shape[1]
        self._stages.begin(PROMPT, total, reuse.length)
        if (new := ids[:, reuse.length :]).shape[1]:
            result = self._pass_in_chunks(new, given, logits)
        self._row = prompt
        return result, reuse.length

    def _cut(self, prompt: Prompt) -> Reuse:
        """Find what is reused, and drop the rest from the cache."""
        row, cache, spec = self._row, self.cache, self.model.spec
        reuse = Reuse()
        if row is not None and cache.length:
            reuse = find_reuse(spec, row, prompt, cache.num_prefix_tokens, self.model.reference)
        if not reuse.length and not (cache.num_prefix_tokens and reuse.images):
            cache.reset()
            self._forget()
            return Reuse()
        cache.crop(cache.num_prefix_tokens + reuse.length)
        self._row = Prompt(
            prompt.ids[: reuse.length], prompt.images[: reuse.images], prompt.cross_mask
        )
        return reuse

    def _find_shared(self, inputs: Inputs, rows: list[list[ImageInput]]) -> Reuse | None:
        """The start that all rows of a batch have in common, if it is worth a pass of its own."""
        ids, mask, spec = inputs["input_ids"], inputs.get("attention_mask"), self.model.spec
        if len(ids) == 1:
            return None
        prompts = _prompts(inputs, rows)
        before = self.model.fusion.stands_before_text(ids, mask, sum(map(len, rows)))
        visual = len(rows[0]) * spec.tokens_per_image if before else 0
        first = prompts[0]._replace(ids=prompts[0].ids[:-1])  # every row has an id of its own
        shared = min(
            find_reuse(spec, first, prompt, visual, self.model.reference) for prompt in prompts[1:]
        )
        if not shared.length or shared.length + visual < MIN_SHARED:
            return None
        # While the rest is computed, padding stands between: a window would be too narrow.
        lengths = [len(prompt.ids) for prompt in prompts]
        windows = [layer.window for layer in spec.text.layers if layer.window is not None]
        if min(lengths) < max(lengths) and max(lengths) > min(windows, default=max(lengths)):
            return None
        if self._reader.layers and not _see_alike(prompts, shared.length):
            return None
        return shared

    def _prefill_shared(
        self, inputs: Inputs, rows: list[list[ImageInput]], shared: Reuse
    ) -> tuple[torch.Tensor, int]:
        """Compute what all rows begin with as one row, repeat it, and compute their rests."""
        padding, length, layers = _padding(inputs), shared.length, self._reader.layers
        first, least = padding[0], min(padding)
        start = {
            name: inputs[name][:1, first : first + length]
            for name in ("input_ids", "cross_attention_mask")
            if name in inputs
        }
        images = rows[0] if layers else rows[0][: shared.images]
        _, num_reused = self._prefill_row(start, images, logits=False)
        start_prompt, self._row = self._row, None
        self.cache.reorder(torch.zeros(len(rows), dtype=torch.long))
        rest = [image for row in rows for image in row[shared.images :]]
        given = {} if layers or not rest else {"image_features": self._reader.features(rest)}
        ids, masks = self._rest(inputs, padding, length)
        total = inputs["input_ids"].numel()
        self._stages.begin(PROMPT, total, total - ids.numel())
        self._masks = masks
        logits = self._pass_in_chunks(ids, given)
        # Padding before the rows, where `decode_step` and windows expect it.
        between = [count - least for count in padding]
        self.cache.move_padding(self.cache.num_prefix_tokens, length, between)
        self._masks = {
            name: inputs[name][:, least:]
            for name in ("attention_mask", "cross_attention_mask")
            if name in inputs
        }
        if not any(between):
            self._masks.pop("attention_mask", None)
        assert start_prompt is not None
        self._shared = between.index(0), start_prompt
        return logits, num_reused

    def _rest(
        self, inputs: Inputs, padding: list[int], length: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Ids without the first `length` of each row, padded on the left, and the masks of both
        parts.
        """
        ids = inputs["input_ids"]
        B, T = ids.shape
        first, width = padding[0], T - min(padding) - length
        places = torch.arange(width, device=ids.device) + min(padding)
        keep = places >= torch.tensor(padding, device=ids.device)[:, None]  # (B, width)
        filler = 1 if self.model.spec.image_token_index == 0 else 0  # no placeholder
        rest, masks = ids[:, T - width :].masked_fill(~keep, filler), {}
        if not keep.all():
            masks["attention_mask"] = torch.cat([keep.new_ones(B, length), keep], 1)
        if (mask := inputs.get("cross_attention_mask")) is not None:
            head = mask[:1, first : first + length].expand(B, -1, -1, -1)
            masks["cross_attention_mask"] = torch.cat([head, mask[:, T - width :]], 1)
        return rest, masks

    def _prefill_rows(
        self, inputs: Inputs, images: list[ImageInput], rows: list[list[ImageInput]] | None
    ) -> torch.Tensor:
        """`prefill` of rows that share nothing; `rows` are their images, where that is known."""
        self.cache.reset()
        self._forget()
        self._row, given = None, {}
        self._masks = {
            name: inputs[name]
            for name in ("attention_mask", "cross_attention_mask")
            if name in inputs
        }
        if self._reader.layers:
            assert rows is not None
            mask = inputs.get("cross_attention_mask")
            self.cache.set_image_keys(*self._reader.keys(rows, mask))
        elif images:
            given["image_features"] = self._reader.features(images)
        if self.model.spec.bidirectional_prefix:
            given["token_type_ids"] = inputs["token_type_ids"]
        self._stages.begin(PROMPT, inputs["input_ids"].numel())
        return self._pass_in_chunks(inputs["input_ids"], given)

    def _pass_in_chunks(
        self, ids: torch.Tensor, given: dict[str, torch.Tensor], logits: bool = True
    ) -> torch.Tensor:
        """`_pass`, in several passes if images do not forbid it."""
        if not given and self.model.fusion.chunk_obstacle is None:
            *chunks, ids = ids.split(self._chunk_size, 1)
            for chunk in chunks:
                self._pass(chunk, {}, keep=None)
                self._stages.advance(chunk.numel())
        result = self._pass(ids, given, keep=1 if logits else None)
        self._stages.advance(ids.numel())
        return result[:, -1]

    def _pass(
        self, ids: torch.Tensor, given: dict[str, torch.Tensor], keep: int | None
    ) -> torch.Tensor:
        """Append ids [B, T] to the cache; return the last logits, [B, keep, V], or hidden states if
        no logits are requested.
        """
        output = self.model.compute(self._inputs(ids, given, keep))
        return output.last_hidden_state if keep is None else output.logits

    def _inputs(
        self, ids: torch.Tensor, given: dict[str, torch.Tensor], keep: int | None
    ) -> ModelInputs:
        """A pass over ids [B, T] behind what is in the cache."""
        cache, masks, T = self.cache, dict(self._masks), ids.shape[1]
        past = cache.length - cache.num_prefix_tokens
        if (mask := masks.pop("attention_mask", None)) is not None:
            mask = pad(mask[:, : past + T], (0, max(past + T - mask.shape[1], 0)), value=1)
        if (cross := masks.pop("cross_attention_mask", None)) is not None:
            rows = torch.arange(past, past + T, device=cross.device)
            masks["cross_attention_mask"] = cross[:, rows.clamp(max=cross.shape[1] - 1)]
        return ModelInputs(
            ids, attention_mask=mask, cache=cache, logits_to_keep=keep, **masks, **given
        )


def _padding(inputs: Inputs) -> list[int]:
    """Number of padded positions before each row."""
    mask = inputs.get("attention_mask")
    return [0] * len(inputs["input_ids"]) if mask is None else (mask == 0).sum(1).tolist()


def _prompts(inputs: Inputs, rows: list[list[ImageInput]]) -> list[Prompt]:
    """The rows of a batch, each without padding."""
    mask = inputs.get("cross_attention_mask")
    return [
        Prompt(
            inputs["input_ids"][row, start:].tolist(),
            [image.key for image in images],
            None if mask is None else mask[row : row + 1, start:],
        )
        for row, (start, images) in enumerate(zip(_padding(inputs), rows, strict=True))
    ]


def _see_alike(prompts: list[Prompt], length: int) -> bool:
    """Whether all rows have the same images, and see no more of them later than in their first
    `length` positions.
    """
    masks = [prompt.cross_mask for prompt in prompts]
    if any(prompt.images != prompts[0].images for prompt in prompts):
        return False
    if masks[0] is None:
        return True
    shown = (masks[0][:, :length] != 0).any(1)
    return all(torch.equal((mask != 0).any(1), shown) for mask in masks)  # type: ignore[union-attr]
