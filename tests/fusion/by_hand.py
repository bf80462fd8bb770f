"""Vision and text put together by hand, of stock transformers' modules with a model's weights: the
oracle of the fusions.
"""

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool1d, gelu, linear
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.mllama.configuration_mllama import MllamaTextConfig as StockConfig
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    _prepare_cross_attention_mask,
)

import tiny
from mllama import MllamaForConditionalGeneration


class ByHand(nn.Module):
    """Reads features after the encoder's final norm. `named` says a parameter's name in our model.

    Args:
        model: ours, whose weights are copied.
    """

    def __init__(self, model: MllamaForConditionalGeneration):
        super().__init__()
        config, self.spec = model.config, model.spec
        vision = {name: getattr(config.vision_config, name) for name in tiny.VISION}
        self.vision = SiglipVisionModel(SiglipVisionConfig(**vision, vision_use_head=False))
        text = {
            name: getattr(config.text_config, name)
            for name in (*tiny.SIZES, *tiny.ENDS, "rms_norm_eps")
        }
        rope = config.text_config.rope_parameters
        self.text = LlamaForCausalLM(
            LlamaConfig(**text, rope_parameters=rope, attn_implementation="eager")
        )
        self.own = nn.ParameterDict(
            {
                name.replace(".", "/"): value.detach().clone()
                for name, value in model.named_parameters()
                if own(name)
            }
        )
        self.crossed = model.spec.text.cross_attention_layers or []
        stock = StockConfig(
            **text | {"bos_token_id": 1, "eos_token_id": 2},
            cross_attention_layers=[1],
            attn_implementation="eager",
        )
        self.cross = nn.ModuleList(
            MllamaCrossAttentionDecoderLayer(stock, index) for index in self.crossed
        )
        weights = model.state_dict()
        for name, parameter in self.named_parameters():
            parameter.data.copy_(weights[self.named(name)])
        self.eval()

    def named(self, name: str) -> str:
        part, rest = name.split(".", 1)
        if part == "own":
            return rest.replace("/", ".")
        if part == "vision":
            return f"vision_tower.{rest.removeprefix('vision_model.')}"
        if part == "cross":
            number, rest = rest.split(".", 1)
            return f"language_model.layers.{self.crossed[int(number)]}.{rest}"
        if rest.startswith("model.layers."):
            number, rest = rest.removeprefix("model.layers.").split(".", 1)
            places = [
                index
                for index in range(self.spec.text.num_hidden_layers)
                if index not in self.crossed
            ]
            return f"language_model.layers.{places[int(number)]}.{rest}"
        return rest.replace("model.", "language_model.")

    def visual(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pooled and projected: [images, tokens, hidden]."""
        weights = {name.split("/", 1)[1]: value for name, value in self.own.items()}
        features = self.vision(pixel_values).last_hidden_state
        if self.spec.pooling == "average":
            features = adaptive_avg_pool1d(
                features.transpose(1, 2), self.spec.tokens_per_image
            ).transpose(1, 2)
        if self.spec.pooling == "learned":
            features = torch.einsum(
                "np,bpw->bnw", self.own["image_pooling/linear/weight"], features
            )
            features = features + self.own["image_pooling/linear/bias"][:, None]
        if self.spec.projector == "linear":
            return linear(
                features,
                self.own["multi_modal_projector/linear/weight"],
                self.own["multi_modal_projector/linear/bias"],
            )
        inner = gelu(linear(features, weights["linear_1/weight"], weights["linear_1/bias"]))
        return linear(inner, weights["linear_2/weight"], weights["linear_2/bias"])

    def prepended(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What the decoder is given: every row's visual tokens, then its text."""
        visual = self.visual(pixel_values)
        visual = visual.reshape(len(input_ids), -1, visual.shape[-1])
        mask = torch.cat([torch.ones(visual.shape[:2], dtype=torch.long), attention_mask], dim=1)
        embeds = torch.cat([visual, self.text.get_input_embeddings()(input_ids)], dim=1)
        return {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }

    def crossing(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        mask: torch.Tensor | None = None,
    ):
        """Logits of a decoder with transformers' cross-attention layers after some of its own."""
        visual = self.visual(pixel_values)
        states, rows = visual.reshape(len(input_ids), -1, visual.shape[-1]), None
        if mask is not None:
            mask, rows = _prepare_cross_attention_mask(
                mask, self.spec.tokens_per_image, visual.dtype
            )
        every = self.crossed[0]
        hooks = [
            self.text.model.layers[number * every + every - 1].register_forward_hook(
                lambda module, args, output, layer=layer: layer(output, states, mask, None, rows)
            )
            for number, layer in enumerate(self.cross)
        ]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = self.text(
            input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).logits
        for hook in hooks:
            hook.remove()
        return logits


def own(name: str) -> bool:
    return name.startswith(("multi_modal_projector.", "image_pooling."))


def same_gradients(model: MllamaForConditionalGeneration, oracle: ByHand) -> None:
    """Every parameter's, all of them with one."""
    ours, seen = dict(model.named_parameters()), set()
    for name, parameter in oracle.named_parameters():
        seen.add(oracle.named(name))
        tiny.close(
            ours[oracle.named(name)].grad, parameter.grad, floor=1e-3
        )  # a key's bias has none but rounding
    assert seen == ours.keys()
