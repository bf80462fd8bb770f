"""transformers' loop of sampling, with the token selected by one operator."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mllama.fusion.base import ModelInputs
from mllama.hf.cache import TransformersCache
from mllama.hf.compat import CACHE_NAME
from mllama.nn.plain import is_plain
from mllama.runtime.sampler import COLDEST, Sampler, Sampling

# In transformers' order, with the attribute that is an option of `Sampling`.
_OPTIONS = {
    RepetitionPenaltyLogitsProcessor: ("penalty", "repetition_penalty"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}

_CALLED = ("forward", "prepare_inputs_for_generation")  # what `sample` does without after a prompt


def split_processors(
    processors: Iterable[LogitsProcessor], do_sample: bool
) -> tuple[LogitsProcessorList, Sampling]:
    """Processors to call, and what the last ones of the list do as options of a `Sampler`."""
    rest, options = list(processors), {}
    kinds = list(_OPTIONS) if do_sample else [RepetitionPenaltyLogitsProcessor]
    while rest and type(rest[-1]) in kinds and _is_plain(rest[-1]):
        one = rest.pop()
        attribute, name = _OPTIONS[type(one)]
        options[name] = getattr(one, attribute)
        kinds = kinds[: kinds.index(type(one))]
    return LogitsProcessorList(rest), Sampling(do_sample=do_sample, **options)


def _is_plain(one: Any) -> bool:
    """Whether a processor has no option that a `Sampler` has not."""
    return (
        getattr(one, "min_tokens_to_keep", 1) == 1
        and getattr(one, "prompt_ignore_length", None) is None
        and getattr(one, "filter_value", -torch.inf) == -torch.inf
        and getattr(one, "temperature", 1) >= COLDEST  # below it is greedy here
    )


def find_loop_obstacle(model: Any, generation_config: Any, synced_gpus: bool) -> str | None:
    """Why `sample` cannot take the place of transformers' loop; None where it can."""
    if not generation_config.use_cache:
        return "use_cache=False"
    prepares = getattr(model.prepare_inputs_for_generation, "__self__", model) is model
    if not (prepares and is_plain(model, type(model)) and all(map(_is_own(model), _CALLED))):
        return "the model has hooks, or methods of its own"
    if generation_config.return_dict_in_generate:
        return "return_dict_in_generate"
    if synced_gpus:
        return "synced_gpus"
    return "an assistant" if getattr(generation_config, "is_assistant", False) else None


def _is_own(model: Any) -> Callable[[str], bool]:
    """Whether a method of the model is this package's, not a subclass's, which may do more."""

    def is_own(method: str) -> bool:
        owner = next(kind for kind in type(model).__mro__ if method in vars(kind))
        return owner.__module__.startswith("mllama.")

    return is_own


def sample(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> torch.Tensor:
    """`GenerationMixin._sample` without what it returns beside the tokens. After the prompt it
    calls the core, which saves most of the time that transformers spends on a token.

    Returns:
        int64 [B, T + new]: the ids and what follows, padded after the end of a row.
    """
    processors, sampling = split_processors(logits_processor, generation_config.do_sample)
    sampler = Sampler(sampling, input_ids)
    pad = generation_config._pad_token_tensor
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = input_ids.new_ones(len(input_ids))  # a prompt of embeddings has no ids
    outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    logits = outputs.logits
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        scores = logits[:, -1]
        if processors:
            scores = processors(input_ids, scores.to(torch.float32, copy=True))
        tokens = sampler(scores)
        if ends:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(tokens)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        if not unfinished.any():
            break
        outputs, logits = {}, _step(model, tokens, model_kwargs)
    if streamer is not None:
        streamer.end()
    return input_ids


def _step(model: Any, tokens: torch.Tensor, model_kwargs: dict[str, Any]) -> torch.Tensor:
    """The logits [B, 1, V] after one more token per row, int64 [B]."""
    positions = model_kwargs.get("position_ids")
    inputs = ModelInputs(
        input_ids=tokens[:, None],
        attention_mask=model_kwargs.get("attention_mask"),
        position_ids=None if positions is None else positions[:, -1:],
        cache=TransformersCache(model_kwargs[CACHE_NAME], model.spec.text),
        cross_attention_mask=model_kwargs.get("cross_attention_mask"),
        logits_to_keep=1,
    )
    return model.compute(inputs).logits
