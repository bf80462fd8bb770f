"""SigLIP's vision model alone: image features, and a pooled feature if it has a head."""

from typing import Any

import torch
from transformers import PreTrainedModel, SiglipVisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllama.encoders.siglip import SiglipImageEncoder, SiglipPoolingHead
from mllama.hf.arguments import check_keywords
from mllama.hf.built import check_built, remember_config
from mllama.hf.config_objects import compose
from mllama.hf.pretrained import PretrainedMixin, own_config


class SiglipModel(PretrainedMixin, PreTrainedModel):
    """transformers' SiglipVisionModel on this package's operators.

    Args:
        config: transformers' SiglipVisionConfig. With `vision_use_head` (the default) it has a
            pooling head.

    Raises:
        TypeError: config has another type.
        ValueError: sizes are invalid; the message names the field.
    """

    config_class = SiglipVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # as in transformers' models
    supports_gradient_checkpointing = True
    _no_split_modules = ["SiglipEncoderLayer", "SiglipPoolingHead"]

    def __init__(self, config: SiglipVisionConfig):
        if not isinstance(config, SiglipVisionConfig):
            raise TypeError(f"config must be a SiglipVisionConfig, got {type(config).__name__}")
        super().__init__(own_config(config))
        self.spec = compose(config)
        vision = self.spec.vision
        self.vision_tower = SiglipImageEncoder(vision)
        self.head = SiglipPoolingHead(vision) if vision.vision_use_head else None
        self.post_init()
        remember_config(self)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The patch embedding."""
        return self.vision_tower.embeddings.patch_embedding  # type: ignore[return-value]

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool | None = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """
        Args:
            pixel_values: float [images, channels, image_size, image_size]; cast to the model's
                dtype.
            output_attentions, output_hidden_states: also return every layer's.
            return_dict: False returns a tuple.
            interpolate_pos_encoding: accept any size, [images, channels, height, width], by
                interpolating positions.
            kwargs: arguments that `mllama.hf.arguments` lists; ignored.

        Returns:
            `last_hidden_state` [images, patches, hidden] after the final norm, `pooler_output`
            [images, hidden] with a head, and `hidden_states`, `attentions` if requested.

        Raises:
            TypeError: pixel_values is not a floating tensor, or an argument is unknown.
            ValueError: pixel_values has the wrong shape.
        """
        check_keywords(type(self).__name__, SiglipModel.forward, kwargs)
        check_built(self)
        encoded = self.vision_tower(
            pixel_values,
            output_hidden_states=bool(
                self.config.output_hidden_states
                if output_hidden_states is None
                else output_hidden_states
            ),
            output_attentions=bool(
                self.config.output_attentions if output_attentions is None else output_attentions
            ),
            interpolate_pos_encoding=bool(interpolate_pos_encoding),
        )
        output = BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=None if self.head is None else self.head(encoded.last_hidden_state),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return (
            output
            if (self.config.return_dict if return_dict is None else return_dict)
            else output.to_tuple()
        )
