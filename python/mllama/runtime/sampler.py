"""Selection of the next token: greedy, or sampled from the same distribution as in transformers."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllama.ops.select_token import penalize, process, select_token

# Below this temperature, 0 included, decoding is greedy: dividing by it would overflow.
COLDEST = 1e-3
DEFAULT_TOP_K = 50  # default of sampling, as in transformers
NEUTRAL = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}  # values without effect
# name: minimum, maximum, whether the minimum itself is excluded
_RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, math.inf, False),
    "top_k": (0, math.inf, False),
    "top_p": (0, 1, False),
    "min_p": (0, 1, False),
    "repetition_penalty": (0, math.inf, True),
}

_NAMES = ("do_sample", *_RANGES, "seed")


@dataclass(frozen=True)
class Sampling:
    """Options of sampling.

    Attributes:
        do_sample: sample the token; False is greedy.
        temperature: divides the logits; below 0.001 decoding is greedy.
        top_k: sample from this number of likeliest tokens; 0 is all.
        top_p: sample from the likeliest tokens that add up to this probability.
        min_p: drop tokens less likely than this fraction of the likeliest one's probability.
        repetition_penalty: divides positive and multiplies negative logits of tokens that are in
            the prompt or the answer; also in greedy decoding.
        seed: seed of the random numbers, 0 to 2**64 - 1; or several, one for each row, whose
            draws then do not depend on the other rows. Default: torch's generator.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, or has no effect with do_sample=False.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise TypeError(f"do_sample must be a bool, got {type(self.do_sample).__name__}")
        for name in _RANGES:
            check_option(name, value := getattr(self, name))
            if name != "top_k":
                object.__setattr__(self, name, float(value))  # of any type of number
        if self.seed is not None:
            check_option("seed", self.seed)
            if isinstance(self.seed, Sequence):
                object.__setattr__(self, "seed", tuple(self.seed))
        if self.do_sample:
            return
        unused = [name for name, value in NEUTRAL.items() if getattr(self, name) != value]
        if self.seed is not None:
            unused.append("seed")
        if unused:
            raise ValueError(f"{', '.join(unused)}: no effect with do_sample=False")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return not self.do_sample or self.temperature < COLDEST

    @property
    def numbers(self) -> dict[str, Any]:
        """What `select_token` takes."""
        return {
            "temperature": 1.0 if self.greedy else self.temperature,
            "top_k": int(self.top_k),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }

    @classmethod
    def choose(cls, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> "Sampling":
        """Complete a call's options: greedy unless a sampling option is given, then with the
        model's defaults.

        Raises:
            TypeError, ValueError: as the class; an option that is none of its.
        """
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if name not in _NAMES:
                raise TypeError(f"{name!r} is no option; of sampling there are {', '.join(_NAMES)}")
            if name != "do_sample":
                check_option(name, value)
        cold = 0 <= given.get("temperature", 1) < COLDEST
        sample = given.get("do_sample", any(name in given for name in NEUTRAL))
        penalty: dict[str, Any] = {}
        if (own_penalty := defaults.get("repetition_penalty")) is not None:
            penalty["repetition_penalty"] = own_penalty
        if not sample or cold:
            options = {
                name: value for name, value in given.items() if not (cold and name in NEUTRAL)
            }
            return cls(**penalty | options | {"do_sample": False})
        own = {name: defaults[name] for name in NEUTRAL if defaults.get(name) is not None}
        return cls(**penalty | {"top_k": DEFAULT_TOP_K} | own | given | {"do_sample": sample})


def check_option(name: str, value: Any) -> None:
    """Check one sampling option.

    Raises:
        TypeError: the value has the wrong type.
        ValueError: the value is out of range.
    """
    if name == "seed" and isinstance(value, (list, tuple)):
        for one in value:
            check_option(name, one)
        return
    whole = name in ("top_k", "seed")
    if isinstance(value, bool) or not isinstance(
        value, numbers.Integral if whole else numbers.Real
    ):
        kind = "an int" if whole else "a number"
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    number: Any = value
    least, most, above = (0, 2**64 - 1, False) if name == "seed" else _RANGES[name]
    if not least <= number <= most or number == math.inf or (above and number == least):
        bounds = f"{'above' if above else 'at least'} {least}"
        bounds += "" if most == math.inf else f" and at most {most}"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def select_again(
    logits: torch.Tensor,
    sampling: Sampling,
    uniform: torch.Tensor | None,
    present: torch.Tensor | None,
) -> torch.Tensor:
    """One step of a `Sampler` that does not wait for a device: rows that it would raise for get the
    token -1 there.

    Args:
        logits: [B, V].
        sampling: the options; the seed is not read.
        uniform, present: as the sampler's `draw_uniform` and `find_present` return them; present is
            written to.

    Returns:
        int64 [B].
    """
    tokens = select_token(logits, uniform, present, **sampling.numbers, non_blocking=True)
    if present is not None:
        present.scatter_(1, tokens[:, None].clamp(min=0), True)
    return tokens


class Sampler:
    """Chooses one token per row, step by step.

    Args:
        sampling: the options.
        input_ids: int64 [B, T], the prompts. Ids without a logit are ignored by the repetition
            penalty.
        keep_mask: bool [B, T], False where padded. Default: no padding.

    Raises:
        ValueError: as many seeds as there are rows are needed, or one.
    """

    def __init__(
        self, sampling: Sampling, input_ids: torch.Tensor, keep_mask: torch.Tensor | None = None
    ):
        self.sampling = sampling
        seeds = sampling.seed if isinstance(sampling.seed, tuple) else (sampling.seed,)
        if isinstance(sampling.seed, tuple) and len(seeds) != len(input_ids):
            raise ValueError(f"seed must be one, or {len(input_ids)}, one a row, got {len(seeds)}")
        self._rows = len(input_ids) // len(seeds) if len(input_ids) else 0  # per generator
        self._generators = [
            None if seed is None else torch.Generator(input_ids.device).manual_seed(int(seed))
            for seed in seeds
        ]
        self._input_ids, self._keep_mask = input_ids, keep_mask
        self._present: torch.Tensor | None = None  # bool [B, V], tokens that occurred

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, V], of any float dtype -> int64 [B].

        Raises:
            ValueError: to sample, a row's largest logit must be finite.
        """
        present = self.find_present(logits.shape[-1])
        tokens = select_token(
            logits, self.draw_uniform(logits.device), present, **self.sampling.numbers
        )
        if present is not None:
            present.scatter_(1, tokens[:, None], True)
        return tokens

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, V] -> float32 [B, V]: scores whose softmax is sampled; -inf for excluded tokens."""
        options, present = self.sampling, self.find_present(logits.shape[-1])
        scores = penalize(logits.float(), present, options.repetition_penalty)
        if options.greedy:
            return scores
        return process(scores, options.temperature, options.top_k, options.top_p, options.min_p)

    def draw_uniform(self, device: torch.device) -> torch.Tensor | None:
        """float64 [B] in [0, 1), from one generator for all rows, or each row's own; None where
        decoding is greedy.
        """
        if self.sampling.greedy:
            return None
        drawn = [
            torch.rand(self._rows, dtype=torch.float64, device=device, generator=generator)
            for generator in self._generators
        ]
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn)

    def find_present(self, vocab_size: int) -> torch.Tensor | None:
        """bool [B, vocab_size], tokens that occurred; None without a repetition penalty."""
        if self._present is None and self.sampling.repetition_penalty != 1:
            self._present = _present(self._input_ids, self._keep_mask, vocab_size)
        return self._present


def _present(
    input_ids: torch.Tensor, keep_mask: torch.Tensor | None, vocab_size: int
) -> torch.Tensor:
    """bool [B, vocab_size]: the tokens that occur in each row."""
    counted = input_ids < vocab_size
    if keep_mask is not None:
        counted &= keep_mask
    ids = input_ids.masked_fill(~counted, vocab_size)  # an extra column for ignored ids
    present = torch.zeros(len(input_ids), vocab_size + 1, dtype=torch.bool, device=input_ids.device)
    return present.scatter_(1, ids, True)[:, :vocab_size].contiguous()
