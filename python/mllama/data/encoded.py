"""An example as tensors."""

from dataclasses import dataclass, field

import torch


@dataclass
class EncodedRow:
    """An example as tensors.

    Attributes:
        input_ids: int64 [T].
        labels: int64 [T], the ids of the assistant's tokens, -100 elsewhere.
        token_type_ids: int64 [T], 1 for the suffix; for PaliGemma alone.
        images: the encoder's inputs; those of tiles begin with [images].
        where: names the row in errors.
        truncated: number of tokens that max_length cut off.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    where: str
    token_type_ids: torch.Tensor | None = None
    images: dict[str, torch.Tensor] = field(default_factory=dict)
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_images(self) -> int:
        return len(self.images["pixel_values"]) if self.images else 0
