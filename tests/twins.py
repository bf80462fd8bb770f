"""Tiny models with random weights, and their twins in stock transformers: the oracle of the model's
tests.
"""

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from mllama import MllamaConfig, MllamaForConditionalGeneration

IMAGE = 97  # the placeholder's id
VOCABULARY = 99
PATCHES = 4
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ENDS = {"bos_token_id": None, "eos_token_id": None}
TEXT = SIZES | ENDS | {"rope_theta": 500000.0}


def config(text: dict | None = None, vision: dict | None = None, **options) -> MllamaConfig:
    """A tiny LLaVA-shaped config, changed by what is given."""
    options = {"image_token_index": IMAGE, "vision_feature": "pre_norm"} | options
    return MllamaConfig(VISION | (vision or {}), TEXT | (text or {}), **options)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values in every parameter, biases and norms too, large enough that a wrong path shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.15, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def model(seed: int = 0, **options) -> MllamaForConditionalGeneration:
    """A tiny model in eval mode."""
    return randomise(MllamaForConditionalGeneration(config(**options)), seed).eval()


def twin_name(name: str) -> str:
    """The name a parameter of ours has in stock transformers' memory."""
    return name if name.startswith("lm_head") else f"model.{name}"


def twin(ours: MllamaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Stock transformers' LLaVA with the same weights."""
    text, vision = ours.config.text_config.to_dict(), ours.config.vision_config.to_dict()
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=ours.config.image_token_index,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    ).eval()
    report = theirs.load_state_dict(
        {twin_name(name): value for name, value in ours.state_dict().items()}
    )
    assert not report.missing_keys and not report.unexpected_keys
    return theirs


def pictures(count: int, seed: int = 1) -> torch.Tensor:
    """[count, 3, 16, 16]."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def tokens(length: int, seed: int = 2) -> list[int]:
    """Random ids that are neither padding (0) nor the placeholder."""
    return torch.randint(
        1, IMAGE, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


def batch(*rows: list[int], side: str = "left") -> dict[str, torch.Tensor]:
    """Rows of ids padded to one length: input_ids and attention_mask."""
    longest = max(map(len, rows))
    ids, mask = (
        torch.zeros(len(rows), longest, dtype=torch.long),
        torch.zeros(len(rows), longest, dtype=torch.long),
    )
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}
