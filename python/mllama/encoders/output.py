"""What an encoder returns."""

from dataclasses import dataclass

import torch


@dataclass
class EncoderOutput:
    """
    Attributes:
        last_hidden_state: [images, features, hidden], or [B, N, tiles, features, hidden] of tiles.
        hidden_states: the embeddings and every layer's output, or None.
        attentions: every layer's probabilities, or None.
    """

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
