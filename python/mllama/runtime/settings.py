"""A model's default generation settings, from generation_config.json."""

from collections.abc import Mapping
from typing import Any

from mllama.runtime.sampler import NEUTRAL, Sampling

# Settings that a session reads, or can ignore: it has its own cache, and callers limit the length.
_READ = {"eos_token_id", "do_sample", *NEUTRAL, "repetition_penalty"}
_WITHOUT_EFFECT = {
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "max_length",
    "max_new_tokens",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}
# Values without effect of settings that a session does not support, beside None and False.
_NEUTRAL = {
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "length_penalty": 1,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1,
}


def beyond_session(settings: Mapping[str, Any]) -> list[str]:
    """Names of settings that affect generation and are not supported by a session."""
    return [
        name
        for name, value in settings.items()
        if name not in _READ | _WITHOUT_EFFECT
        and not name.startswith(("_", "output_", "num_assistant", "assistant_"))
        and value not in (None, False)
        and value != _NEUTRAL.get(name)
    ]


def check_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Check the sampling settings of a model's files.

    Raises:
        ValueError: a setting has the wrong type or is out of range.
    """
    try:
        Sampling.choose({"do_sample": True}, settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: generation_config.json: {error}") from error
