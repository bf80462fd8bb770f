"""A model's own defaults of generation, as generation_config.json has them."""

from collections.abc import Mapping
from typing import Any

from mllama.runtime.sampler import NEUTRAL, Sampling

# What a session reads, and what means nothing to it: it has a cache of its own, and callers say how
# long an answer may be.
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
# Values that change nothing, of options that a session does not have; None and False are others.
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
    """Names of settings that change what is generated and that a session does not have."""
    return [
        name
        for name, value in settings.items()
        if name not in _READ | _WITHOUT_EFFECT
        and not name.startswith(("_", "output_", "num_assistant", "assistant_"))
        and value not in (None, False)
        and value != _NEUTRAL.get(name)
    ]


def check_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Check the settings of sampling in the files at `where`.

    Raises:
        ValueError: one of another type, or out of range.
    """
    try:
        Sampling.choose({"do_sample": True}, settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: generation_config.json: {error}") from error
