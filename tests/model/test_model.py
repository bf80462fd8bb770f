"""What the core model refuses: each argument by its name."""

import numpy as np
import pytest
import torch

import tiny
from mllama.fusion.base import ModelInputs
from mllama.nn.kv_cache import KVCache
from tiny import pairs

IDS = torch.tensor([tiny.tokens(5)])


@pytest.mark.parametrize(
    ("given", "error", "name"),
    [
        ({}, ValueError, "input_ids"),
        ({"input_ids": IDS, "inputs_embeds": torch.randn(1, 5, 64)}, ValueError, "inputs_embeds"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids"),
        ({"input_ids": IDS[0]}, ValueError, "input_ids"),
        ({"input_ids": IDS, "attention_mask": [1]}, TypeError, "attention_mask"),
        ({"input_ids": IDS, "prefix_length": torch.tensor([3])}, ValueError, "prefix_length"),
        ({"input_ids": IDS, "aspect_ratio_ids": IDS}, ValueError, "aspect_ratio_ids"),
        ({"input_ids": IDS, "cross_attention_mask": IDS}, ValueError, "cross_attention_mask"),
        ({"input_ids": IDS, "logits_to_keep": "a"}, TypeError, "logits_to_keep"),
        ({"input_ids": IDS, "logits_to_keep": np.int64(1)}, TypeError, "logits_to_keep"),
        ({"input_ids": IDS, "cache": KVCache(1)}, IndexError, "layer"),
    ],
)
def test_arguments_are_refused_by_name(given, error, name):
    with pytest.raises(error, match=name), torch.no_grad():
        pairs.pair("llama").ours.compute(ModelInputs(**given))
