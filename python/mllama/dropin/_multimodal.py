"""`MllamaForConditionalGeneration` of older scripts: SigLIP, one linear layer and Llama."""

import warnings

import torch
from torch import nn
from transformers import PretrainedConfig

from mllama.checkpoints.files import listing
from mllama.dropin._arguments import made_in
from mllama.dropin._config import MLLAMAConfig, is_unsaid
from mllama.dropin._conversation import assistant_mask
from mllama.dropin._model import OlderModel
from mllama.dropin._older_checkpoints import TABLE
from mllama.dropin._placeholders import no_text
from mllama.fusion.merge import find_placeholder, merge
from mllama.fusion.projector import LinearProjector
from mllama.nn.loss import next_token_loss


class MultiModalProjector(LinearProjector):
    """One linear layer from the tower's width to the decoder's, `.linear`.

    Args:
        config: whose `vision_config` and `text_config` say the widths.
    """

    def __init__(self, config: MLLAMAConfig):
        super().__init__(config.vision_config.hidden_size, config.text_config.hidden_size)


class VisionModel(nn.Module):
    """A model's tower as scripts call it: pixels -> features.

    Attributes:
        vision_model: the tower; its parameters are the model's.
    """

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.vision_model = tower

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[pictures, channels, image_size, image_size] -> [pictures, patches, hidden], after the
        final norm.
        """
        return self.vision_model(pixel_values).last_hidden_state


class MllamaForConditionalGeneration(OlderModel):
    """Answers about pictures, under the names that older scripts call.

    Parameters have this package's names; weight files with the older ones are read by
    `load_state_dict`. `from_pretrained` reads every folder that
    `mllama.MllamaForConditionalGeneration` reads.

    Args:
        config: `MLLAMAConfig`; its weights are random, in `config.dtype`. Or what
            `mllama.MllamaForConditionalGeneration` takes.
        reference: as there.

    Raises:
        TypeError: no config.
        ValueError: a family, a size, a choice or a reference that cannot be.
    """

    def __init__(self, config: PretrainedConfig, reference: str = "meta"):
        device = torch.get_default_device()
        if not isinstance(config, MLLAMAConfig) or device.type == "meta":
            super().__init__(config, reference)
        else:  # laid out first, so that the values of billions of weights are drawn once
            with torch.device("meta"), made_in(config.dtype):
                super().__init__(config, reference)
            self.to_empty(device=device)
            self.init_weights()
        if self.config.model_type == MLLAMAConfig.model_type:
            self.older_files = TABLE

    @property
    def vision_model(self) -> VisionModel:
        """The tower, whose call returns the bare features."""
        return VisionModel(self.vision_tower)

    def find_placeholders(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pictures: int = 0,
        per_picture: int | None = None,
    ) -> torch.Tensor:
        """As the package's: bool [B, T]. Where no script said the id, it is told from the runs it
        stands in; an id that no text has goes before one that an answer may repeat."""
        if self.spec.fusion != "merge" or not is_unsaid(self.config.image_token_index):
            return super().find_placeholders(input_ids, attention_mask, pictures, per_picture)
        seen = (
            torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is None
            else attention_mask != 0
        )
        for places in (seen & self._no_text(input_ids), seen):
            token = (
                find_placeholder(
                    input_ids, places, per_picture or self.spec.tokens_per_image, pictures
                )
                if pictures
                else None
            )
            if token is not None:
                return (input_ids == token) & seen
        return torch.zeros_like(seen)

    def _no_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        return no_text(input_ids, self.get_input_embeddings().num_embeddings)

    def _placeholders(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pictures: int,
        filled: bool = False,
        per_picture: int | None = None,
    ) -> torch.Tensor | None:
        """As the package's. A prompt of text alone is answered without its picture, and a warning
        says so; one with an `<image>` that was not expanded is refused."""
        told = self.spec.fusion != "merge" or not is_unsaid(self.config.image_token_index)
        if told or not pictures or filled or torch.compiler.is_compiling():
            return super()._placeholders(input_ids, attention_mask, pictures, filled, per_picture)
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        if self.find_placeholders(input_ids, mask, pictures, per_picture).any():
            return super()._placeholders(input_ids, attention_mask, pictures, filled, per_picture)
        per_picture = per_picture or self.spec.tokens_per_image
        if per_picture != self.spec.tokens_per_image:
            raise ValueError(
                f"input_ids hold no runs of {per_picture} placeholders, as many as each of {pictures} pictures has features"
            )
        if strays := [
            str(token) for token in input_ids[self._no_text(input_ids)].unique().tolist()
        ]:
            raise ValueError(
                f"input_ids hold {listing(strays)}, which no text has, but not in runs of {per_picture} for each of {pictures} pictures: "
                f"expand each <image> with the processor, MllamaImageProcessor(tokenizer, {per_picture}, image_size)"
            )
        warnings.warn(
            f"pixel_values are not looked at: no id of input_ids stands in runs of {per_picture}, as the processor "
            "(MllamaImageProcessor) puts <image>",
            stacklevel=3,
        )
        return None

    def _merge_input_ids_with_image_features(
        self,
        image_features: torch.Tensor,
        inputs_embeds: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write projected features in the placeholders' places.

        Args:
            image_features: [pictures, patches, hidden], in row order.
            inputs_embeds: [B, T, hidden].
            input_ids: int [B, T].
            attention_mask: [B, T], zero where padded, or None.

        Returns:
            [B, T, hidden] in inputs_embeds' dtype, and the mask, ones where there was none: new
            tensors.

        Raises:
            ValueError: placeholders that are not as many as features, or features of another shape.
        """
        pictures, per_picture = self._count_pictures(None, image_features)
        placeholders = self._placeholders(
            input_ids, attention_mask, pictures, per_picture=per_picture
        )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.clone()
        return inputs_embeds.clone() if placeholders is None else merge(
            inputs_embeds, placeholders, image_features
        ), mask

    def _compute_loss_with_masking(
        self, logits: torch.Tensor, labels: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        """The mean loss of logits [B, T, vocabulary] at t against labels [B, T] at t + 1.
        Placeholders in input_ids [B, T], one picture to a row where the config does not say their
        id, and labels of `ignore_index` are not trained.
        """
        placeholders = self.find_placeholders(input_ids, pictures=input_ids.shape[0])
        return next_token_loss(
            logits, labels, labels.shape, placeholders=placeholders, ignore_index=self.ignore_index
        )

    def _create_conversation_mask(self, input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
        """bool [B, T]: what the assistant says in input_ids [B, T] of a chat in Llama 3's form, its
        `<|eot_id|>` included.

        Raises:
            ValueError: the tokenizer has no such ids.
        """
        return assistant_mask(input_ids, tokenizer)
