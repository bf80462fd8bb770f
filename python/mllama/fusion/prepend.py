"""Visual tokens prepended to a text without placeholders.

Masks, labels and positions are given for the text alone and extended here. The cache remembers how
many visual tokens it begins with, so later calls need not repeat it.
"""

import torch
from torch.nn.functional import pad

from mllama.fusion.base import DecoderInputs, ModelInputs, Parts, share_evenly
from mllama.fusion.merge import MergeFusion


def share_out(image_features: torch.Tensor, rows: int) -> torch.Tensor:
    """[images, patches, hidden] -> [rows, images per row * patches, hidden]."""
    per_row = share_evenly(image_features.shape[0], rows)
    return image_features.unflatten(0, (rows, per_row)).flatten(1, 2)


class PrependFusion(MergeFusion):
    """Visual tokens are prepended, or replace placeholders if the text has some."""

    chunk_obstacle = 'fusion="prepend"'
    any_feature_count = False
    optional = True

    def prepare(
        self, inputs: ModelInputs, padding_mask: torch.Tensor | None, parts: Parts
    ) -> DecoderInputs:
        cached = inputs.cache.num_prefix_tokens if inputs.past else 0
        prepared = super().prepare(inputs, padding_mask, parts)
        if inputs.cache is not None and not inputs.past:
            inputs.cache.num_prefix_tokens = prepared.num_prefix_tokens
        if visual := cached + prepared.num_prefix_tokens:
            self._extend(prepared, inputs, cached, visual)
        return prepared

    def join(self, inputs, padding_mask, embeds, placeholders, features, attentions):
        """`DecoderInputs` with the features at their placeholders, or prepended."""
        if placeholders is not None:
            return super().join(inputs, padding_mask, embeds, placeholders, features, attentions)
        visual = share_out(features, embeds.shape[0]).to(embeds)
        prepared = self.pass_on(
            inputs,
            padding_mask,
            torch.cat([visual, embeds], dim=1),
            features=features,
            attentions=attentions,
        )
        prepared.num_prefix_tokens = visual.shape[1]
        return prepared

    def may_stand_before(self, inputs: ModelInputs, images: int) -> bool:
        if not inputs.past:
            return True
        again, rows = images * self.spec.tokens_per_image, inputs.shape[0]
        cached = inputs.cache.num_prefix_tokens
        if again and again != cached * rows and (cached or self.spec.image_token_index is None):
            raise ValueError(
                f"images must stand before the text: cache holds text, and {cached} visual tokens "
                "before it"
            )
        return False

    def locate(self, input_ids, attention_mask, images, continuing=False, per_image=None):
        if self.spec.image_token_index is None:
            return None
        return super().locate(input_ids, attention_mask, images, continuing, per_image)

    def ids_of(self, inputs_embeds, embedding):
        if self.spec.image_token_index is None:  # there are no placeholders
            return inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.long)
        return super().ids_of(inputs_embeds, embedding)

    def extra_cache_tokens(self, images: int, rows: int) -> int:
        return -(-images // rows) * self.spec.tokens_per_image

    def stands_before_text(self, input_ids, attention_mask, images):
        return bool(images) and self.locate(input_ids, attention_mask, images) is None

    def _extend(
        self, prepared: DecoderInputs, inputs: ModelInputs, cached: int, visual: int
    ) -> None:
        """Extend mask, positions and labels over the visual tokens."""
        length, new = inputs.shape[1], prepared.num_prefix_tokens
        if prepared.first_key is not None and not torch.compiler.is_compiling():
            raise ValueError(
                "position_ids must be of one sequence per row: they restart, and visual tokens "
                "stand before the text"
            )
        prepared.first_key = None  # the decoder finds it from the extended positions
        text_length = inputs.past - cached + length
        _check_own("attention_mask", prepared.padding_mask, text_length, visual)
        _check_own("position_ids", prepared.position_ids, length, visual)
        _check_own("labels", prepared.labels, length, visual)
        prepared.padding_mask = _lengthen(prepared.padding_mask, visual, 1)
        prepared.position_ids = _shift_positions(prepared.position_ids, cached, new)
        prepared.labels = _lengthen(prepared.labels, new, self.spec.ignore_index)


def _check_own(name: str, tensor: torch.Tensor | None, length: int, visual: int) -> None:
    if isinstance(tensor, torch.Tensor) and tensor.shape[1:] != (length,):
        raise ValueError(
            f"{name} must be [batch, {length}], the text's own without the {visual} visual tokens "
            f"before it, got {list(tensor.shape)}"
        )


def _lengthen(tensor: torch.Tensor | None, count: int, value: int) -> torch.Tensor | None:
    """[B, T] -> [B, count + T], `value` in front. Other shapes are checked where they are read."""
    return pad(tensor, (count, 0), value=value) if isinstance(tensor, torch.Tensor) else tensor


def _shift_positions(
    position_ids: torch.Tensor | None, cached: int, new: int
) -> torch.Tensor | None:
    """Positions [B, T] of a text -> [B, new + T], after `cached` and `new` visual tokens."""
    if not isinstance(position_ids, torch.Tensor):
        return position_ids
    front = torch.arange(new, device=position_ids.device, dtype=position_ids.dtype)
    front = front.expand(position_ids.shape[0], new)  # (B, new)
    return torch.cat([front, position_ids + cached + new], dim=1)
