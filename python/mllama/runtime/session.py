"""Generation with a core model: prefill, decode, sampling, streaming, and a cache that is reused
from turn to turn.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mllama.lora.named import lora_active
from mllama.lora.turns import turn
from mllama.nn.adapted import adapter_state
from mllama.nn.checks import check_count
from mllama.nn.kv_cache import CACHE_DTYPES
from mllama.runtime.checks import check_ends, check_padding, check_room
from mllama.runtime.completion import Generation, Row
from mllama.runtime.decode_graph import DecodeGraph
from mllama.runtime.drafts import make_drafter
from mllama.runtime.fingerprint import structure
from mllama.runtime.image_cache import ImageCache
from mllama.runtime.images import IMAGE_INPUTS, arithmetic
from mllama.runtime.passes import Passes
from mllama.runtime.prefill import PromptCache
from mllama.runtime.progress import DECODE, Progress, Stages, check_progress
from mllama.runtime.sampler import NEUTRAL, Sampler, Sampling
from mllama.runtime.settings import beyond_session
from mllama.text.checks import check_ids

_log = logging.getLogger(__name__)
MAX_NEW_TOKENS = 128
OPTIONS = frozenset(
    ("max_new_tokens", "eos_token_id", "do_sample", *NEUTRAL, "repetition_penalty")
)  # options of transformers' generate that a session supports
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "cross_attention_mask", *IMAGE_INPUTS)


class Session:
    """Generates with a model. What was computed is reused: of the last prompt the next one computes
    only what differs, such as a chat's next turn; the start that all rows of a batch have in common
    is computed once, and so is every image. After changing the model's weights, call
    `reset`. Hooks, another dtype or device, and autocast are noticed, and so are adapters, this
    package's and PEFT's, when they are attached, loaded, replaced, switched or merged.

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
        image_cache: keeps what was computed of images, features or a decoder's keys and values.
            Default: a new one with its defaults, 512 MiB in memory.
        progress: called while generating, as progress(stage, done, total): stage "image" counts
            images, "prompt" and "decode" count tokens.
        prompt_lookup_tokens: most tokens, up to 15, that are guessed for one pass: where the last
            tokens stood before, in the prompt or the answer, the text may go on as it did. 0
            guesses none.
        draft_model: a smaller `VisionLanguageModel` of text, with the same vocabulary, that guesses
            tokens for the model; instead of prompt_lookup_tokens.

    On a CUDA device a pass after the prompt is one CUDA graph, with the selection of tokens, where
    nothing forbids it: drafts, hooks, other libraries' layers, or layers that stay on the host. The
    cache has room for `max_new_tokens` then.

    Guessed tokens are verified: text, sampled text too, is the same as without them, on a packed
    model to the bit. Batches of several rows are generated without guesses.

    Raises:
        TypeError: a processor without a tokenizer; settings or image_cache of another type;
            progress that is not callable; draft_model that is no such model.
        ValueError: settings of transformers' generate that a session does not have; another
            kv_cache; an image_cache that is another model's, or of a model without images;
            prompt_lookup_tokens out of range; a draft_model that takes images or has another
            vocabulary.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        settings: Mapping[str, Any] | None = None,
        where: str | None = None,
        prefill_chunk_size: int = 1024,
        kv_cache: str | None = None,
        image_cache: ImageCache | None = None,
        progress: Progress | None = None,
        prompt_lookup_tokens: int = 0,
        draft_model: Any = None,
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
        if not isinstance(image_cache, (ImageCache, type(None))):
            raise TypeError(
                f"image_cache must be an ImageCache or None, got {type(image_cache).__name__}"
            )
        if image_cache is not None and model.spec.encoder is None:
            raise ValueError("image_cache must be None: this model takes no images")
        self.image_cache = ImageCache() if image_cache is None else image_cache
        self.image_cache.attach(model)
        self._prompt = PromptCache(model, self.image_cache, kv_cache, prefill_chunk_size)
        self._graph = DecodeGraph(model)
        self._drafting = prompt_lookup_tokens, draft_model
        self._drafter = make_drafter(model, *self._drafting)
        self._state = self._look()
        self.progress = progress
        self._running = False

    @property
    def context(self) -> int:
        """Maximum tokens of a prompt and its answer together."""
        return self.model.spec.text.max_position_embeddings

    def reset(self) -> None:
        """Drop the cached prompt and what the image cache has in memory.

        Raises:
            RuntimeError: the session is generating.
        """
        if self._running:
            raise RuntimeError("reset: this session is generating")
        self._prompt.drop()
        self._graph.drop()
        self._drafter = make_drafter(self.model, *self._drafting)
        self.image_cache.clear()
        self._state = self._look()

    def _look(self) -> tuple:
        """What the cached prompt was computed with, beside weights."""
        first = next(self.model.parameters())
        numbers = first.dtype, first.device, *arithmetic(first.device.type)
        return adapter_state(), structure([self.model]), numbers

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
        adapter: str | None = None,
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
            adapter: name of the model's adapter (`mllama.load_lora`) to answer with. Nothing that
                was computed with another one is used. Default: the one in use.
            sampling: do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed; see
                `Sampling`. Greedy unless one of the first five is given.

        Raises:
            TypeError: an input or option is unknown or has the wrong type.
            ValueError: an option is out of range or has no effect; padding is on the right; the
                prompt fills the context; stop or on_text is given without a processor; the model
                has no such adapter, or one is merged.
            RuntimeError: this session generates already: on_text or another thread called it.
        """
        if self._running:
            raise RuntimeError("generate: this session generates already; use another session")
        check_count("max_new_tokens", max_new_tokens)
        with turn(self.model) if adapter is None else lora_active(self.model, adapter):
            if self._state != self._look():  # what is cached is of other adapters, modules or hooks
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
            reason = self._generate(
                interruptible,
                lambda: self._run(
                    inputs, rows, sampler, max_new_tokens, self._ends(eos_token_id), result
                ),
            )
        for row in rows:
            row.finish(reason)
        self._stages.finish()
        return result

    def _generate(self, interruptible: bool, run: Callable[[], None]) -> str:
        """Run, and say why rows that have not ended stop; the cache is restored on a throw."""
        self._running = True
        try:
            run()
            return "length"
        except KeyboardInterrupt:
            self._prompt.restore()
            if not interruptible:
                raise
            return "interrupted"
        except BaseException:
            self._prompt.restore()
            raise
        finally:
            self._running = False

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
        drafter = self._drafter if len(rows) == 1 else None
        graph = None if drafter is not None else self._choose_graph(inputs["input_ids"].device)
        cache = self._prompt.cache
        at_first = max_new_tokens if graph is not None else min(max_new_tokens, MAX_NEW_TOKENS)
        cache.capacity = min(result.num_prompt_tokens + at_first, self.context)
        logits, result.num_reused_tokens = self._prompt.prefill(inputs, self._stages)
        if drafter is not None:
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            drafter.begin((ids if mask is None else ids[mask != 0]).flatten().tolist())
        passes = Passes(self._prompt, sampler, drafter, graph, result)
        room = min(max_new_tokens, check_room(self.context, cache.length))
        try:
            for step, tokens in enumerate(passes.tokens(logits, room)):
                if step == 0:
                    self._stages.begin(DECODE, room * len(rows), len(rows))
                else:
                    self._stages.advance(sum(not row.done for row in rows))
                for row, token in zip(rows, tokens, strict=True):
                    row.take(token, ends)
                if all(row.done for row in rows):
                    break
        finally:  # an interrupted answer leaves no drafts either
            passes.finish()
        self._prompt.finish(keep_buffers=graph is not None)

    def _choose_graph(self, device: torch.device) -> DecodeGraph | None:
        """What captures passes on a device; None where that cannot be."""
        obstacle = self._graph.find_obstacle(device)
        if obstacle is None:
            return self._graph
        _log.debug("passes are not captured: %s", obstacle)
        return None

    def _ends(self, given: int | Sequence[int] | None) -> frozenset[int]:
        if given is None:
            given = self.settings.get("eos_token_id")
        if given is None:
            given = getattr(self.tokenizer, "eos_token_id", None)
        return check_ends(given)

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
        if "pixel_values" not in taken and (
            loose := [name for name in IMAGE_INPUTS if name in taken]
        ):
            raise ValueError(f"{loose[0]} needs pixel_values")
        if (mask := taken.get("attention_mask")) is not None:
            check_padding(mask, ids.shape)
            if mask.all():
                del taken["attention_mask"]
        if self.model.spec.bidirectional_prefix and "token_type_ids" not in taken:
            taken["token_type_ids"] = torch.zeros_like(ids)  # the prompt
        return taken
