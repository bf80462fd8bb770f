"""Which id stands for a picture where only the processor was told."""

import torch

from mllama.dropin._config import IMAGE_TOKEN_INDEX

# Ids that `<image>` has: nominally, and by processors of older scripts in this process. Such
# scripts never pass them on to the config.
_GIVEN = {int(IMAGE_TOKEN_INDEX)}


def remember(token_id: int) -> None:
    """Note that a processor's tokenizer has `<image>` under this id."""
    _GIVEN.add(token_id)


def no_text(input_ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Where ids stand that no text has, bool of input_ids' shape: `<image>`, and what lies outside
    the vocabulary.
    """
    given = torch.tensor(sorted(_GIVEN), device=input_ids.device)
    return torch.isin(input_ids, given) | (input_ids >= vocabulary)
