"""Selection of the next token: greedy, or sampled with the same processing of logits, in the same
order, as in transformers.
"""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

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
        seed: seed of the random numbers, 0 to 2**64 - 1. Default: torch's generator.

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
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise TypeError(f"do_sample must be a bool, got {type(self.do_sample).__name__}")
        for name in _RANGES:
            check_option(name, value := getattr(self, name))
            if name != "top_k":
                object.__setattr__(self, name, float(value))  # of any type of number
        if self.seed is not None:
            check_option("seed", self.seed)
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


class Sampler:
    """Chooses one token per row, step by step.

    Args:
        sampling: the options.
        input_ids: int64 [B, T], the prompts. Ids without a logit are ignored by the repetition
            penalty.
        keep_mask: bool [B, T], False where padded. Default: no padding.
    """

    def __init__(
        self, sampling: Sampling, input_ids: torch.Tensor, keep_mask: torch.Tensor | None = None
    ):
        self.sampling = sampling
        self._generator: torch.Generator | None = None
        if sampling.seed is not None:
            self._generator = torch.Generator(input_ids.device).manual_seed(int(sampling.seed))
        self._input_ids, self._keep_mask = input_ids, keep_mask
        self._present: torch.Tensor | None = None  # bool [B, V], tokens that occurred

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, V], of any float dtype -> int64 [B]."""
        scores = self.process(logits)
        if self.sampling.greedy:
            tokens = scores.argmax(-1)
        else:
            probabilities = scores.softmax(-1)
            tokens = torch.multinomial(probabilities, 1, generator=self._generator).squeeze(1)
        if self._present is not None:
            self._present.scatter_(1, tokens[:, None], True)
        return tokens

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, V] -> float32 [B, V]: scores whose softmax is sampled; -inf for excluded tokens."""
        options, scores = self.sampling, logits.float()
        if options.repetition_penalty != 1:
            scores = self._penalize(scores)
        if options.greedy:
            return scores
        if options.temperature != 1:
            scores = scores / options.temperature
        if options.top_k:
            least = scores.topk(min(options.top_k, scores.shape[-1])).values[:, -1:]  # (B, 1)
            scores = scores.masked_fill(scores < least, -math.inf)
        if options.top_p < 1:
            scores = _top_p(scores, options.top_p)
        if options.min_p > 0:
            probabilities = scores.softmax(-1)
            least = options.min_p * probabilities.amax(-1, keepdim=True)  # (B, 1)
            scores = scores.masked_fill(probabilities < least, -math.inf)
        return scores

    def _penalize(self, scores: torch.Tensor) -> torch.Tensor:
        if self._present is None:
            self._present = _present(self._input_ids, self._keep_mask, scores.shape[-1])
        penalty = self.sampling.repetition_penalty
        lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(self._present, lowered, scores)


def _present(
    input_ids: torch.Tensor, keep_mask: torch.Tensor | None, vocab_size: int
) -> torch.Tensor:
    """bool [B, vocab_size]: the tokens that occur in each row."""
    counted = input_ids < vocab_size
    if keep_mask is not None:
        counted &= keep_mask
    ids = input_ids.masked_fill(~counted, vocab_size)  # an extra column for ignored ids
    present = torch.zeros(len(input_ids), vocab_size + 1, dtype=torch.bool, device=input_ids.device)
    return present.scatter_(1, ids, True)[:, :vocab_size]


def _top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Exclude the unlikeliest tokens that add up to 1 - top_p or less; at least one stays."""
    ordered, order = scores.sort(dim=-1)
    dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    dropped[:, -1] = False
    return scores.masked_fill(dropped.scatter(1, order, dropped), -math.inf)
