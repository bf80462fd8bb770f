"""The embedded model's sizes, and the auxiliary heads used in training."""

from __future__ import annotations

import torch
from torch import nn

from .initial import local_attention
from .labels import HEADS, OFFSETS, SILHOUETTE


def build_model(
    tokenizer,
    image_size: int = 96,
    patch_size: int = 8,
    width: int = 128,
    vision_layers: int = 6,
    text_layers: int = 4,
):
    """A randomly initialized `MllamaForConditionalGeneration` in LLaVA's layout, whose vision
    encoder starts with local attention.
    """
    from mllama import MllamaConfig, MllamaForConditionalGeneration

    vocab = -(-len(tokenizer) // 16) * 16
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = MllamaConfig(
        vision_config={
            "hidden_size": width, "intermediate_size": 4 * width,
            "num_hidden_layers": vision_layers, "num_attention_heads": width // 32,
            "image_size": image_size, "patch_size": patch_size,
        },
        text_config={
            "vocab_size": vocab, "hidden_size": width,
            "intermediate_size": -(-width * 8 // 3) // 16 * 16, "num_hidden_layers": text_layers,
            "num_attention_heads": width // 32, "num_key_value_heads": width // 64,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True, "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "rms_norm_eps": 1e-5,
        },
        image_token_index=image, projection_dim=width, vision_feature="pre_norm",
    )  # fmt: skip
    model = MllamaForConditionalGeneration(config)
    local_attention(model.vision_tower)
    _start_decoder(model)
    return model


@torch.no_grad()
def _start_decoder(model) -> None:
    """Initialize decoder and projector by fan-in; a standard deviation of 0.02 is too small at this
    width.
    """
    for name, weight in [
        *model.language_model.named_parameters(),
        *model.multi_modal_projector.named_parameters(),
    ]:
        if weight.dim() < 2:
            continue
        scale = 1.0 if "embed_tokens" not in name else 0.0
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale = 0.5
        if scale:
            weight.normal_(std=scale / weight.shape[1] ** 0.5)
        else:
            weight.normal_(std=0.05)


class DenseHeads(nn.Module):
    """One linear layer that predicts all dense labels from each patch's features. Discarded after
    training.
    """

    # class 0, "nothing here", covers most of every image and gets a lower weight
    NOTHING = {"shape": 0.3, "color": 0.3, "center": 0.1, "character": 0.1}
    WEIGHTS = {
        "shape": 2.0, "color": 1.0, "position": 0.5, "objects": 0.3, "same_color": 0.3,
        "same_shape": 0.3, "rank": 0.3, "center": 1.0,
        "character": 1.0, "place": 0.4,
    }  # fmt: skip

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, sum(HEADS.values()) + OFFSETS + SILHOUETTE)

    def forward(
        self, features: torch.Tensor, classes: torch.Tensor, offsets: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss and accuracy of the dense labels.

        Args:
            features: [B, P, width].
            classes: int64 [B, P, heads], IGNORE where there is no label.
            offsets: float32 [B, P, 66], NaN where there is no label.

        Returns:
            (loss, accuracy by head, on patches with an object).
        """
        *parts, moves, ink = self.linear(self.norm(features.float())).split(
            [*HEADS.values(), OFFSETS, SILHOUETTE], -1
        )
        loss, right = features.new_zeros((), dtype=torch.float32), {}
        for i, (name, part) in enumerate(zip(HEADS, parts, strict=True)):
            wanted, scores = classes[..., i].reshape(-1), part.reshape(-1, part.shape[-1])
            known = wanted >= 0
            if not known.any():
                continue
            wanted, scores = wanted[known], scores[known]
            weight = None
            if name in self.NOTHING:
                weight = torch.ones(scores.shape[-1])
                weight[0] = self.NOTHING[name]
            loss = loss + self.WEIGHTS[name] * nn.functional.cross_entropy(
                scores, wanted, weight=weight
            )
            there = wanted > 0 if name in self.NOTHING else wanted >= 0
            if there.any():
                right[name] = float((scores.argmax(-1) == wanted)[there].float().mean())
        moved, inked = offsets.split([OFFSETS, SILHOUETTE], -1)
        known = ~moved.isnan()
        if known.any():
            loss = loss + 0.5 * nn.functional.smooth_l1_loss(moves[known], moved[known])
        known = ~inked.isnan()
        if known.any():
            loss = loss + 3.0 * nn.functional.binary_cross_entropy_with_logits(
                ink[known], inked[known]
            )
        return loss, right
