"""Output of an image encoder."""

from dataclasses import dataclass

import torch


@dataclass
class EncoderOutput:
    """
    Attributes:
        last_hidden_state: [images, features, hidden], or tiled [B, N, tiles, features, hidden].
        hidden_states: the embeddings and every layer's output, or None.
        attentions: every layer's probabilities, or None.
    """

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
