"""Our tiny models, and their twin in stock transformers: the oracle of the model's tests."""

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from mllama import MllamaConfig, MllamaForConditionalGeneration
from tiny.sizes import IMAGE, TEXT, VISION


def config(text: dict | None = None, vision: dict | None = None, **options) -> MllamaConfig:
    """A tiny LLaVA-shaped config, changed by what is given."""
    options = {"image_token_index": IMAGE, "vision_feature": "pre_norm"} | options
    return MllamaConfig(VISION | (vision or {}), TEXT | (text or {}), **options)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values in every parameter, biases and norms too, large enough to show a wrong path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.15, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def model(seed: int = 0, **options) -> MllamaForConditionalGeneration:
    """A tiny model in eval mode."""
    return randomize(MllamaForConditionalGeneration(config(**options)), seed).eval()


def prepend(seed: int = 0, **options) -> MllamaForConditionalGeneration:
    """A tiny model with visual tokens before the text and no placeholder."""
    fusion = {"fusion": "prepend", "vision_feature": "last", "image_token_index": None}
    return model(seed, **fusion | options)


def crossed(every: int = 1, layers: int = 2, **options) -> MllamaForConditionalGeneration:
    """A tiny model with a cross-attention layer after `every` of its `layers`."""
    fusion = {"fusion": "cross_attention", "cross_attention_every": every}
    text = {"text": {"num_hidden_layers": layers}}
    return model(**fusion | text | {"vision_feature": "last", "image_token_index": None} | options)


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
    weights = {twin_name(name): value for name, value in ours.state_dict().items()}
    report = theirs.load_state_dict(weights)
    assert not report.missing_keys and not report.unexpected_keys
    return theirs


def twin_name(name: str) -> str:
    """The name a parameter of ours has in stock transformers' memory."""
    return name if name.startswith("lm_head") else f"model.{name}"


def close(
    ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4, floor: float = 0.0
) -> None:
    """Within `tolerance` of the largest value, or of `floor` where that is larger."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(theirs.abs().max().item(), floor)
