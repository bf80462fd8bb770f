"""select_token on Llama 3's vocabulary, against torch's sort, top-k and multinomial."""

from collections.abc import Iterator

import torch

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case
from mllama.ops import select_token
from mllama.ops.select_token import process

PEER = "torch: topk, sort, softmax, multinomial, as transformers' generate"
ROWS = (1, 16)
WAYS = {
    "greedy": None,
    "plain": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "all": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}


def cases() -> Iterator[Case]:
    """Every way of sampling, number of rows and dtype."""
    for dtype in DTYPES:
        for rows in ROWS:
            logits = (2 * torch.randn(rows, shapes.VOCABULARY)).to(dtype)
            uniform = torch.rand(rows, dtype=torch.float64)
            for name, options in WAYS.items():
                if options is None:
                    ours, peer = lambda x=logits: select_token(x), lambda x=logits: x.argmax(-1)
                else:
                    ours = lambda x=logits, u=uniform, o=options: select_token(x, u, **o)  # noqa: E731
                    peer = lambda x=logits, o=options: _sample(x, o)  # noqa: E731
                size = logits.numel() * logits.element_size()
                yield Case(
                    f"{name} {rows}x{shapes.VOCABULARY}", dtype, "forward", ours, peer, bytes=size
                )


def _sample(logits: torch.Tensor, options: dict) -> torch.Tensor:
    return torch.multinomial(process(logits.float(), **options).softmax(-1), 1)
