"""Generation with a core model: prefill, decode, sampling, streaming, and a cache that is reused
from turn to turn.
"""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from mllama.fusion.base import ModelInputs
from mllama.nn.adapted import count_changes
from mllama.nn.kv_cache import CACHE_DTYPES, KVCache
from mllama.runtime.completion import Generation, Row
from mllama.runtime.prefix import Reuse, find_reuse, same_images
from mllama.runtime.progress import DECODE, IMAGE, PROMPT, Progress, Stages, check_progress
from mllama.runtime.sampler import NEUTRAL, Sampler, Sampling
from mllama.runtime.settings import beyond_session
from mllama.text.decoder import check_ids

MAX_NEW_TOKENS = 128
OPTIONS = frozenset(
    ("max_new_tokens", "eos_token_id", "do_sample", *NEUTRAL, "repetition_penalty")
)  # options of transformers' generate that a session supports
_IMAGES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "cross_attention_mask", *_IMAGES)


class Session:
    """Generates with a model. The cache of the last one-row prompt is reused: the next prompt
    computes only what differs, such as a chat's next turn. After changing the model's weights, call
    `reset`; adapters that are attached, replaced, switched or merged are noticed.

    Args:
        model: a `VisionLanguageModel` in eval mode.
        processor: a processor with a `tokenizer`, or a tokenizer. None generates ids without text.
        settings: the model's defaults, as in generation_config.json: eos_token_id, and sampling
            options that a call does not give.
        where: the model's files, used in errors.
        prefill_chunk_size: prompts without images are prefilled in chunks of this many tokens if
            the model permits it, which bounds the memory of activations.
        kv_cache: what keys and values are stored in: "int8" (8.5 bits a value), "bf16", "f16" or
            "f32". Default: the activations' dtype. A packed model decodes on it directly.
        progress: called while generating, as progress(stage, done, total): stage "image" counts
            images, "prompt" and "decode" count tokens.

    Raises:
        TypeError: a processor without a tokenizer, settings of another type, progress that is not
            callable.
        ValueError: settings of transformers' generate that a session does not have; another
            kv_cache.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        settings: Mapping[str, Any] | None = None,
        where: str | None = None,
        prefill_chunk_size: int = 1024,
        kv_cache: str | None = None,
        progress: Progress | None = None,
    ):
        check_progress(progress)
        check_count("prefill_chunk_size", prefill_chunk_size)
        if kv_cache not in (None, *CACHE_DTYPES):
            raise ValueError(
                f"kv_cache must be one of {', '.join(CACHE_DTYPES)} or None, got {kv_cache!r}"
            )
        if not isinstance(settings, (Mapping, type(None))):
            raise TypeError(f"settings must be a dict or None, got {type(settings).__name__}")
        if unknown := beyond_session(settings or {}):
            raise ValueError(f"settings: a session has no {unknown[0]}; transformers' generate has")
        self.model, self.processor, self.settings = model, processor, dict(settings or {})
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if processor is not None and not hasattr(self.tokenizer, "decode"):
            raise TypeError(f"processor must have a tokenizer, got {type(processor).__name__}")
        self.where = where
        self.prefill_chunk_size = prefill_chunk_size
        self.kv_cache = kv_cache
        self.progress = progress
        self._encoded: tuple[dict, torch.Tensor] | None = None  # images and their features
        self._running = False
        self.reset()

    @property
    def context(self) -> int:
        """Maximum tokens of a prompt and its answer together."""
        return self.model.spec.text.max_position_embeddings

    @property
    def _can_chunk(self) -> bool:
        spec = self.model.spec
        return self.model.fusion.chunk_obstacle is None and not spec.bidirectional_prefix

    def reset(self) -> None:
        """Drop the cached prompt and its image features.

        Raises:
            RuntimeError: the session is generating.
        """
        if self._running:
            raise RuntimeError("reset: this session is generating")
        self._drop()

    def _drop(self) -> None:
        self._encoded, self._changes = None, count_changes()
        self._cross_mask: torch.Tensor | None = None  # of the cached prompt
        dtype = None if self.kv_cache is None else CACHE_DTYPES[self.kv_cache]
        self._cache = KVCache(self.model.spec.text.num_hidden_layers, dtype=dtype)
        self._ids: list[int] = []  # ids of one row in the cache
        self._images: dict[str, torch.Tensor] | None = None  # images in the cache; None: unknown

    @torch.inference_mode()
    def generate(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
        eos_token_id: int | Sequence[int] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        interruptible: bool = False,
        **sampling: Any,
    ) -> Generation:
        """Generate a completion for every row.

        Args:
            inputs: a processor's output: input_ids int64 [B, T]; attention_mask [B, T], zero
                where padded, on the left; pixel_values and related tensors.
            max_new_tokens: maximum length; less at the end of the context.
            stop: strings that end a row's text.
            eos_token_id: ids that end a row. Default: the settings', or the tokenizer's.
            on_text: called after every token with the row's index and its new text, which may
                be "".
            interruptible: Ctrl-C ends all rows and returns their text so far, instead of raising
                KeyboardInterrupt.
            sampling: do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed; see
                `Sampling`. Greedy unless one of the first five is given.

        Raises:
            TypeError: an input or option is unknown or has the wrong type.
            ValueError: an option is out of range or has no effect; padding is on the right; the
                prompt fills the context; stop or on_text is given without a processor.
            RuntimeError: this session generates already: on_text or another thread called it.
        """
        if self._running:
            raise RuntimeError("generate: this session generates already; use another session")
        check_count("max_new_tokens", max_new_tokens)
        if self._changes != count_changes():  # what is cached is of other adapters
            self.reset()
        self._stages = Stages(self.progress)
        inputs = self._take_inputs(inputs)
        options = Sampling.choose(sampling, self.settings)
        stop = self._stop_strings(stop, on_text)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        check_room(self.context, ids.shape[1])
        rows = [Row(index, self.tokenizer, stop, on_text) for index in range(len(ids))]
        completions = [row.completion for row in rows]
        result = Generation(completions, ids.shape[1], timings=self._stages.timings)
        sampler = Sampler(options, ids, None if mask is None else mask != 0)
        self._running = True
        try:
            self._run(inputs, rows, sampler, max_new_tokens, self._ends(eos_token_id), result)
            reason = "length"
        except KeyboardInterrupt:
            self._restore()
            if not interruptible:
                raise
            reason = "interrupted"
        except BaseException:
            self._restore()
            raise
        finally:
            self._running = False
        for row in rows:
            row.finish(reason)
        self._stages.finish()
        if len(rows) > 1:
            self.reset()
        return result

    def _run(
        self,
        inputs: dict[str, torch.Tensor],
        rows: list[Row],
        sampler: Sampler,
        max_new_tokens: int,
        ends: frozenset[int],
        result: Generation,
    ) -> None:
        """Prefill, then decode until every row has ended or has `max_new_tokens`."""
        self._cache.capacity = result.num_prompt_tokens + min(max_new_tokens, MAX_NEW_TOKENS)
        logits = self._prefill(inputs, result)
        room = min(max_new_tokens, check_room(self.context, self._cache.length))
        for step in range(room):
            tokens = sampler(logits)  # (B,)
            ids = tokens.tolist()
            if step == 0:
                self._stages.begin(DECODE, room * len(rows), len(rows))
            else:
                self._stages.advance(sum(not row.done for row in rows))
            for row, token in zip(rows, ids, strict=True):
                row.take(token, ends)
            if step == room - 1 or all(row.done for row in rows):
                break
            logits = self._forward(tokens[:, None], inputs)
            if self._ids:  # of one row without padding
                self._ids += ids

    def _prefill(self, inputs: dict[str, torch.Tensor], result: Generation) -> torch.Tensor:
        """Compute the part of the prompts that is not cached; return the last logits, [B, V]."""
        ids = inputs["input_ids"]
        images = {name: inputs[name] for name in _IMAGES if name in inputs}
        reuse = self._reuse(inputs, images)
        result.num_reused_tokens = reuse.length
        new = ids[:, reuse.length :]  # (B, T - reused)
        given: dict[str, Any] = self._new_images(images, reuse.images, len(ids))
        self._stages.begin(PROMPT, ids.numel(), ids.numel() - new.numel())
        if given:
            self._images = None  # until they are written
        elif self._can_chunk:
            while new.shape[1] > self.prefill_chunk_size:
                chunk, new = new.split(
                    [self.prefill_chunk_size, new.shape[1] - self.prefill_chunk_size], 1
                )
                self._forward(chunk, inputs, logits=False)
                self._stages.advance(chunk.numel())
        if "token_type_ids" in inputs:
            given["token_type_ids"] = inputs["token_type_ids"][:, reuse.length :]
        logits = self._forward(new, inputs, **given)
        self._stages.advance(new.numel())
        if len(ids) == 1 and "attention_mask" not in inputs:
            self._ids, self._images = ids[0].tolist(), images
            self._cross_mask = inputs.get("cross_attention_mask")
        return logits

    def _forward(
        self, ids: torch.Tensor, inputs: dict[str, torch.Tensor], logits: bool = True, **given: Any
    ) -> torch.Tensor:
        """Append ids [B, T] to the cache; return the last logits, [B, V], or hidden states if no
        logits are requested.
        """
        cache, mask = self._cache, inputs.get("attention_mask")
        if mask is not None:
            length = cache.length - cache.num_prefix_tokens + ids.shape[1]
            mask = pad(mask[:, :length], (0, max(length - mask.shape[1], 0)), value=1)
        if "cross_attention_mask" in inputs:
            given["cross_attention_mask"] = inputs["cross_attention_mask"]
        keep = 1 if logits else None
        output = self.model.compute(
            ModelInputs(ids, attention_mask=mask, cache=cache, logits_to_keep=keep, **given)
        )
        return output.logits[:, -1] if logits else output.last_hidden_state

    def _reuse(self, inputs: dict[str, torch.Tensor], images: dict[str, torch.Tensor]) -> Reuse:
        """Find the reusable part of the prompt, and drop the rest from the cache."""
        ids, reuse = inputs["input_ids"], Reuse()
        if len(ids) == 1 and "attention_mask" not in inputs and self._images is not None:
            reuse = find_reuse(
                self.model.spec, self._cache, self._ids, self._images, ids[0].tolist(), images
            )
        if not reuse.length or not self._sees_the_same(inputs, reuse.length):
            reuse = Reuse()
            self._cache.reset()
            self._ids, self._images = [], {}
            return reuse
        self._cache.crop(self._cache.num_prefix_tokens + reuse.length)
        self._ids = self._ids[: reuse.length]
        return reuse

    def _sees_the_same(self, inputs: dict[str, torch.Tensor], length: int) -> bool:
        """Whether the first positions attend to the same images as before. Positions after a mask's
        last row repeat it.
        """
        before, now = self._cross_mask, inputs.get("cross_attention_mask")
        if before is None or now is None:
            return before is now
        rows = torch.arange(length, device=now.device)
        return torch.equal(*(mask[:, rows.clamp(max=mask.shape[1] - 1)] for mask in (before, now)))

    def _new_images(
        self, images: dict[str, torch.Tensor], first: int, rows: int
    ) -> dict[str, torch.Tensor]:
        """Arguments for the images from `first` on. For one row they are encoded once and kept for
        later prompts.
        """
        if not images or first >= len(images["pixel_values"]):
            return {}
        if rows > 1 or self.model.spec.encoder is None:  # the model rejects them
            return dict(images)
        if self._encoded is None or not same_images(self._encoded[0], images):
            self._encoded = images, self._encode(images)
        others = {name: value for name, value in images.items() if name != "pixel_values"}
        return others | {"image_features": self._encoded[1][first:]}

    def _encode(self, images: dict[str, Any]) -> torch.Tensor:
        count = images["pixel_values"].shape[1 if self.model.spec.has_tiles else 0]
        self._stages.begin(IMAGE, count)
        features = self.model.encode_images(ModelInputs(**images))[0]
        self._stages.advance(count)
        return features

    def _restore(self) -> None:
        """After an interrupted pass, crop the cache to what is complete."""
        if self._images is None or not self._ids:
            self._drop()
        else:
            self._cache.crop(self._cache.num_prefix_tokens + len(self._ids))

    def _ends(self, given: int | Sequence[int] | None) -> frozenset[int]:
        if given is None:
            given = self.settings.get("eos_token_id")
        if given is None:
            given = getattr(self.tokenizer, "eos_token_id", None)
        if given is None:
            return frozenset()
        ends: list[Any] = (
            list(given) if isinstance(given, (list, tuple, set, frozenset)) else [given]
        )
        if not all(isinstance(end, numbers.Integral) and not isinstance(end, bool) for end in ends):
            raise TypeError(f"eos_token_id must be an int or a list of them, got {given!r}")
        return frozenset(int(end) for end in ends)

    def _stop_strings(self, stop: Sequence[str], on_text: Callable | None) -> tuple[str, ...]:
        if not isinstance(stop, (str, list, tuple)):
            raise TypeError(f"stop must be a str or a list of them, got {type(stop).__name__}")
        if on_text is not None and not callable(on_text):
            raise TypeError(f"on_text must be callable, got {type(on_text).__name__}")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(one, str) and one for one in stop):
            raise ValueError(f"stop must be strings that are not empty, got {stop!r}")
        if self.tokenizer is None and (stop or on_text):
            raise ValueError("stop and on_text need a processor")
        return stop

    def _take_inputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs on the model's device, without a mask of ones."""
        if not isinstance(inputs, Mapping):
            raise TypeError(f"inputs must be a dict, got {type(inputs).__name__}")
        if unknown := [name for name in inputs if name not in _INPUTS]:
            raise TypeError(f"inputs must be {', '.join(_INPUTS)}; got {unknown[0]!r}")
        given = {name: value for name, value in inputs.items() if value is not None}
        for name, value in given.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        check_ids(given.get("input_ids"))
        if not len(given["input_ids"]):
            raise ValueError("input_ids must be [batch, tokens] with at least one row")
        device = next(self.model.parameters()).device
        taken = {name: value.to(device) for name, value in given.items()}
        ids = taken["input_ids"]
        if "pixel_values" not in taken and (loose := [name for name in _IMAGES if name in taken]):
            raise ValueError(f"{loose[0]} needs pixel_values")
        if (mask := taken.get("attention_mask")) is not None:
            check_padding(mask, ids.shape)
            if mask.all():
                del taken["attention_mask"]
        if self.model.spec.bidirectional_prefix and "token_type_ids" not in taken:
            taken["token_type_ids"] = torch.zeros_like(ids)  # the prompt
        return taken


def check_count(name: str, value: Any) -> None:
    """Raise TypeError unless it is an int, ValueError unless it is at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_room(context: int, prompt: int) -> int:
    """Number of tokens that a prompt leaves for its answer.

    Raises:
        ValueError: there are none.
    """
    if prompt >= context:
        raise ValueError(
            f"the prompt is {prompt} tokens long; this model takes {context}, answer included"
        )
    return context - prompt


def check_padding(mask: torch.Tensor, shape: torch.Size) -> None:
    """Raise ValueError unless a mask is [B, T] and its rows are zeros and then ones."""
    if mask.shape != shape:
        raise ValueError(f"attention_mask must be {list(shape)}, got {list(mask.shape)}")
    keep = mask != 0
    if not keep[:, -1].all() or (keep[:, :-1] & ~keep[:, 1:]).any():
        raise ValueError("attention_mask must be zero on the left only: pad rows on the left")
