"""Answers with transformers' `generate`, behind the interface of `runtime.session.Session`: for
transformers models, and for options that a session does not support.
"""

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from mllama.hf.arguments import nearest
from mllama.hf.encoded_images import encode_once
from mllama.lora.named import lora_active
from mllama.lora.turns import turn
from mllama.nn.checks import check_count
from mllama.runtime.checks import check_ends, check_room
from mllama.runtime.completion import Completion, Generation
from mllama.runtime.progress import DECODE, PROMPT, Progress, Stages, check_progress
from mllama.runtime.questions import tokenizer_of
from mllama.runtime.sampler import COLDEST, NEUTRAL, check_option
from mllama.runtime.session import MAX_NEW_TOKENS

_COUNTS = ("max_new_tokens", "max_length", "num_beams")


class GenerateSession:
    """A `Session` on `model.generate`. No cache is kept between calls.

    Args:
        model: any transformers model with `generate`.
        processor: a processor with a `tokenizer`, or a tokenizer.
        progress: as `Session` takes it; images are part of the prompt.

    Raises:
        TypeError: progress is not callable.
    """

    def __init__(
        self, model: PreTrainedModel | Any, processor: Any, progress: Progress | None = None
    ):
        check_progress(progress)
        self.model, self.processor, self.progress = model, processor, progress
        self.tokenizer = tokenizer_of(processor)

    @property
    def where(self) -> str:
        """The model's files."""
        return str(self.model.config.name_or_path)

    @property
    def context(self) -> int:
        """Maximum tokens of a prompt and its answer together."""
        return _context(self.model)

    def generate(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        on_text: Callable[[int, str], None] | None = None,
        interruptible: bool = False,
        adapter: str | None = None,
        **generate_kwargs: Any,
    ) -> Generation:
        """As `Session.generate`. With several beams or rows, text comes at the end.

        Args:
            adapter: as `Session.generate` takes it, of a model of this package.
            generate_kwargs: options of transformers' `generate`. Default: at most 128 new tokens,
                greedy; temperature, top_k, top_p or min_p turn sampling on. stop_strings are read
                by the processor's tokenizer.

        Raises:
            TypeError: an option has the wrong type, or `generate` has no such option.
            ValueError: the prompt fills the context, or `generate` rejects an option.
        """
        prompt, rows = inputs["input_ids"].shape[1], len(inputs["input_ids"])
        stages = Stages(self.progress)
        result = Generation([], prompt, timings=stages.timings)
        streamer = None
        if on_text is not None and rows == self._beams(generate_kwargs) == 1:
            streamer = TextPieces(self.tokenizer, functools.partial(on_text, 0))
            generate_kwargs["streamer"] = streamer
        criteria = StoppingCriteriaList(generate_kwargs.pop("stopping_criteria", None) or [])
        criteria.append(_Steps(stages, rows, prompt))
        generate_kwargs["stopping_criteria"] = criteria
        ends = self._ends(generate_kwargs)
        if generate_kwargs.get("stop_strings") is not None:
            generate_kwargs.setdefault("tokenizer", self.tokenizer)
        stages.begin(PROMPT, rows * prompt)
        try:
            with turn(self.model) if adapter is None else lora_active(self.model, adapter):
                sequences = generate(self.model, inputs, **generate_kwargs)
        except KeyboardInterrupt:
            if not interruptible or streamer is None:
                raise
            streamer.end()  # writes the pending text
            result.completions = [Completion(streamer.ids, streamer.text.strip(), "interrupted")]
        else:
            sequences = getattr(sequences, "sequences", sequences)
            if len(sequences) != rows:
                raise ValueError(
                    "generation_config must leave num_return_sequences at 1: every question has "
                    "one answer"
                )
            result.completions = [self._complete(row[prompt:].tolist(), ends) for row in sequences]
            if on_text is not None and streamer is None:
                for index, completion in enumerate(result.completions):
                    on_text(index, completion.text or "")
        stages.finish()
        # _Steps counts rows that have ended, too.
        lengths = [len(row.token_ids) for row in result.completions]
        stages.timings.decode.count = sum(max(length - 1, 0) for length in lengths)
        return result

    def _complete(self, ids: list[int], ends: frozenset[int]) -> Completion:
        """A row's completion, cut after its end token."""
        place = next((place for place, token in enumerate(ids) if token in ends), None)
        reason = "length" if place is None else "eos"
        ids = ids if place is None else ids[: place + 1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(ids, text.strip(), reason)

    def _beams(self, generate_kwargs: Mapping[str, Any]) -> int:
        settings = generate_kwargs.get("generation_config") or self.model.generation_config
        return generate_kwargs.get("num_beams") or settings.num_beams or 1

    def _ends(self, generate_kwargs: Mapping[str, Any]) -> frozenset[int]:
        settings = generate_kwargs.get("generation_config") or self.model.generation_config
        ends = generate_kwargs.get("eos_token_id")
        ends = settings.eos_token_id if ends is None else ends
        return check_ends(ends.tolist() if isinstance(ends, torch.Tensor) else ends)


def generate(model: Any, inputs: Mapping[str, torch.Tensor], **generate_kwargs: Any) -> Any:
    """Call `model.generate` on encoded prompts, with the defaults and checks of
    `GenerateSession.generate`.
    """
    room = check_room(_context(model), inputs["input_ids"].shape[1])
    options = complete_options(generate_kwargs)
    if "max_new_tokens" in options:
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
    # Where accelerate has the weights elsewhere between calls, it moves inputs by itself.
    place = None if model.device.type == "meta" else model.device
    given = {name: value if place is None else value.to(place) for name, value in inputs.items()}
    given = encode_once(model, given, generate_kwargs.keys() - {"streamer", "stopping_criteria"})
    with torch.inference_mode():
        return model.generate(**given, **options)


def _context(model: Any) -> int:
    return model.config.get_text_config().max_position_embeddings


def complete_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the options of `generate`: greedy unless a sampling option is given.

    Raises:
        TypeError: an option has the wrong type, or `generate` has no such option.
        ValueError: an option is out of range or has no effect.
    """
    options = {name: value for name, value in given.items() if value is not None}
    check_known(options)
    for name in options.keys() & set(_COUNTS):
        check_count(name, options[name])
    if not isinstance(options.get("do_sample", False), bool):
        raise TypeError(f"do_sample must be a bool, got {type(options['do_sample']).__name__}")
    for name in options.keys() & {*NEUTRAL, "repetition_penalty"}:
        check_option(name, options[name])
        if not isinstance(options[name], numbers.Integral) or name != "top_k":
            options[name] = float(options[name])  # transformers rejects ints
    if "generation_config" in options:
        return options
    sampling = [name for name in NEUTRAL if options.get(name, NEUTRAL[name]) != NEUTRAL[name]]
    if options.get("do_sample") is False and sampling:
        raise ValueError(f"{', '.join(sampling)}: no effect with do_sample=False")
    if "max_length" not in options:
        options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    if options.get("temperature", 1) < COLDEST:
        options = {name: value for name, value in options.items() if name not in NEUTRAL}
        options["do_sample"] = False
    options.setdefault("do_sample", any(name in options for name in NEUTRAL))
    return options


def check_known(options: Mapping[str, Any]) -> None:
    """Reject options that `generate` does not have; transformers would pass them to the model.

    Raises:
        TypeError: an option is unknown; the message names it and the nearest one.
    """
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    known |= _generate_arguments()
    for name in options:
        if name not in known:
            raise TypeError(f"generate has no option {name!r}{nearest(name, known)}")


@functools.cache
def _generate_arguments() -> set[str]:
    named = inspect.signature(GenerationMixin.generate).parameters.keys()
    # It takes the last two from its kwargs.
    return {*named - {"self", "inputs", "kwargs"}, "tokenizer", "assistant_tokenizer"}


class _Steps(StoppingCriteria):
    """Tells every step of `generate` to its stages, and stops nothing."""

    def __init__(self, stages: Stages, rows: int, prompt: int):
        self._stages, self._rows, self._prompt, self._length = stages, rows, prompt, prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Called by generate after every step with the ids so far, [B * beams, T]."""
        new = self._rows * (input_ids.shape[1] - self._length)
        if self._length == self._prompt:
            self._stages.advance(self._rows * self._prompt)
            self._stages.begin(DECODE, 0, new)
        else:
            self._stages.advance(new)
        self._length = input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TextPieces(TextStreamer):
    """A transformers streamer that passes on the text of every token.

    Attributes:
        text: the text so far.
        ids: the tokens so far.

    Args:
        tokenizer: decodes the tokens.
        on_text: called after every token with its text, "" if none is certain yet.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self.ids: list[int] = []
        self._on_text = on_text

    def put(self, value: torch.Tensor) -> None:
        """Called by generate with the prompt, then with each token."""
        if self.next_tokens_are_prompt:
            super().put(value)
            return
        self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by TextStreamer with text that is certain."""
        self.text += text
        self._on_text(text)
