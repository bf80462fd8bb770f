"""A complete vision-language model: encoder -> projector -> fusion -> decoder -> head."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from mllama.config.checks import check_reference
from mllama.config.features import choose_features
from mllama.config.spec import ModelSpec
from mllama.encoders import ENCODERS
from mllama.fusion import make_fusion
from mllama.fusion.base import DecoderInputs, ModelInputs, Parts
from mllama.fusion.cross_attention import CrossAttentionDecoderLayer
from mllama.fusion.projector import make_pooling, make_projector
from mllama.model.fast_decoder import MAX_ROWS, FastDecoder, find_obstacle, find_obstacle_of_pass
from mllama.nn.activation import softcap
from mllama.nn.loss import counted_loss, counted_loss_of_states
from mllama.nn.packed import PackedEmbedding, PackedLinear
from mllama.nn.plain import is_plain
from mllama.nn.static_cache import StaticCache
from mllama.nn.wrappers import is_sharded
from mllama.text.checks import check_mask, check_text, split_mask
from mllama.text.decoder import Decoder, DecoderOutput
from mllama.text.prefix import count_prefix

_log = logging.getLogger(__name__)
_OF_TILES = ("aspect_ratio_ids", "aspect_ratio_mask")


@dataclass
class ModelOutput:
    """Output of `VisionLanguageModel.compute`.

    Attributes:
        last_hidden_state: [B, T, hidden], after the final norm; prepended visual tokens come first.
            This and logits are float32 where `decode_step` ran, whatever the model's dtype.
        num_prefix_tokens: number of prepended visual tokens.
        logits: [B, T, vocabulary], or of the requested positions; None if not requested.
        loss: float32 scalar, if labels were given.
        num_trained_tokens: int64 scalar, number of labels in the loss.
        hidden_states: the decoder's, layers + 1 of [B, T, hidden].
        attentions: the decoder's, one [B, heads, T, keys] float32 per layer.
        image_features: projected features, as `encode_images` returns them.
        image_attentions: the encoder's attentions.
    """

    last_hidden_state: torch.Tensor
    num_prefix_tokens: int = 0
    logits: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    num_trained_tokens: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor | None, ...] | None = None
    image_features: torch.Tensor | None = None
    image_attentions: tuple[torch.Tensor, ...] | None = None


class VisionLanguageModel(nn.Module):
    """encoder x projector x fusion x decoder x head, built from a spec with random weights.

    Args:
        spec: what to build.
        reference: which Llama-3.2-Vision to follow, "meta" or "hf"; can be set later. Other
            families ignore it.

    Attributes:
        fusion: brings images into the decoder's inputs; it has no parameters.
    """

    _fast: FastDecoder | str | None = None  # the decoder for `decode_step`, or why there is none

    def __init__(self, spec: ModelSpec, reference: str = "meta"):
        super().__init__()
        self.build(spec, reference)

    def build(self, spec: ModelSpec, reference: str) -> None:
        """Create the modules. Separate from __init__ for subclasses with another base class."""
        self.set_spec(spec)
        self.reference = reference
        text = spec.text
        if spec.encoder is not None:
            self.vision_tower = ENCODERS[spec.encoder](spec.vision)
            self.multi_modal_projector = make_projector(spec)
        if spec.pooling is not None:
            self.image_pooling = make_pooling(spec)
        self.language_model = Decoder(text, CrossAttentionDecoderLayer)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    def set_spec(self, spec: ModelSpec) -> None:
        """Replace the spec by one that differs only in fields read at call time."""
        self.spec = spec
        self.fusion = make_fusion(spec)

    @property
    def reference(self) -> str:
        """Which Llama-3.2-Vision is followed: "meta" or "hf"."""
        return self._reference

    @reference.setter
    def reference(self, value: str) -> None:
        check_reference(value)
        self._reference = value

    def encode_images(
        self, inputs: ModelInputs
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Encode and project the images of a forward pass.

        Returns:
            Features [images, patches (or pooled tokens), hidden], for tiled images [B,
            images * tiles * patches, hidden]; and the encoder's attentions if requested.
        """
        spec = self.spec
        # Called by its class: what wraps the encoder (torch.compile) is called, not gone around.
        features, attentions = ENCODERS[spec.encoder].read(  # type: ignore[index]
            self.vision_tower,
            inputs.pixel_values,
            inputs.aspect_ratio_ids,
            inputs.aspect_ratio_mask,
            inputs.choice or choose_features(spec),
            self.reference,
            inputs.output_attentions,
        )
        if spec.pooling is not None:
            features = self.image_pooling(features)
        return self.multi_modal_projector(features), attentions

    def encoder_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that `encode_images` runs, with their names."""
        for name in ("vision_tower", "image_pooling", "multi_modal_projector"):
            if hasattr(self, name):
                yield name, getattr(self, name)

    def image_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that images pass before any text is read, with their names: the encoder's, and
        those that make keys and values of its features.
        """
        yield from self.encoder_modules()
        for index in self.spec.text.cross_attention_layers:
            attention = self.language_model.layers[index].cross_attn
            for name in ("k_proj", "k_norm", "v_proj"):
                yield f"layers.{index}.{name}", getattr(attention, name)

    def compute(self, inputs: ModelInputs) -> ModelOutput:
        """One forward pass.

        Raises:
            TypeError, ValueError, IndexError: as raised by the fusion, the decoder and the loss.
        """
        self._check(inputs)
        padding_mask, attn_mask = split_mask(inputs.attention_mask)
        prepared = self.fusion.prepare(inputs, padding_mask, self._parts())
        decoded = self._decode_step(inputs, prepared) or self.language_model(
            inputs_embeds=prepared.embeds,
            attention_mask=prepared.padding_mask if attn_mask is None else attn_mask,
            position_ids=prepared.position_ids,
            cache=inputs.cache,
            output_attentions=inputs.output_attentions,
            output_hidden_states=inputs.output_hidden_states,
            prefix_length=self._prefix_length(inputs, prepared, attn_mask),
            first_key=prepared.first_key,
            cross=prepared.cross,
        )
        output = ModelOutput(
            decoded.last_hidden_state,
            prepared.num_prefix_tokens,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            image_features=prepared.features,
            image_attentions=prepared.attentions,
        )
        return self._with_logits(output, decoded, inputs, prepared)

    def _apply(self, fn, recurse=True):
        """As torch's, which copies shared buffers one by one: a packed head still shares the
        embeddings' matrix afterwards.
        """
        super()._apply(fn, recurse)
        text, embeddings = self.spec.text, self.language_model.embed_tokens
        if text.tie_word_embeddings and isinstance(embeddings, PackedEmbedding):
            self.lm_head.packed = embeddings.packed
        return self

    def requires_grad_(self, requires_grad: bool = True):
        """As torch's.

        Raises:
            ValueError: the model is packed, and its weights would have to be trained.
        """
        if requires_grad and any(isinstance(module, PackedLinear) for module in self.modules()):
            raise ValueError(
                "the weights of a packed model are frozen: train adapters beside them "
                "(mllama.convert_linears_to_lora), or a model that is not packed"
            )
        return super().requires_grad_(requires_grad)

    def read_again(self) -> None:
        """Before a prompt that continues a cache: read the modules for `decode_step` again, so that
        changes of weights and hooks are noticed.
        """
        self._fast = None

    def start_decoding(self, inputs: ModelInputs) -> tuple[DecoderInputs, FastDecoder | None]:
        """What `decode` takes, for all positions that follow a prompt, one per row and pass.

        Args:
            inputs: the first one's, whose cache has the prompt.

        Raises:
            TypeError, ValueError, IndexError: as `compute`.
        """
        self._check(inputs)
        prepared = self.fusion.prepare(inputs, inputs.attention_mask, self._parts())
        return prepared, self._choose_fast(inputs, prepared)

    def decode(
        self,
        input_ids: torch.Tensor,
        prepared: DecoderInputs,
        fast: FastDecoder | None,
        cache: StaticCache,
    ) -> torch.Tensor:
        """Append a position to every row. Nothing is checked, and the host waits for nothing, so
        that the pass can be captured.

        Args:
            input_ids: int64 [B, 1].
            prepared: as `start_decoding` returns it, with padding_mask bool [B, keys] and
                position_ids int64 [B, 1]; its embeds are not read.
            fast: as `start_decoding` returns it.
            cache: its length moves, too.

        Returns:
            Logits [B, vocabulary].
        """
        prepared = replace(prepared, embeds=self.language_model.embed_tokens(input_ids))
        if fast is not None:
            states = fast(prepared, cache)
        else:
            states = self.language_model.decode(
                prepared.embeds, prepared.position_ids, cache, prepared.padding_mask, prepared.cross
            )
            cache.advance(1)
        return self.compute_logits(states[:, -1:])[:, -1]

    def _decode_step(self, inputs: ModelInputs, prepared: DecoderInputs) -> DecoderOutput | None:
        """A few new positions after others by `decode_step`, if it can run them."""
        fast = self._choose_fast(inputs, prepared)
        return None if fast is None else DecoderOutput(fast(prepared, inputs.cache))

    def _choose_fast(self, inputs: ModelInputs, prepared: DecoderInputs) -> FastDecoder | None:
        """The decoder for `decode_step`, if this one is packed and nothing forbids to run a pass by
        it. Other passes drop what was read of the modules, as `read_again` does.
        """
        if self.training or torch.compiler.is_compiling():
            return None
        fast, (B, T, _) = self._fast, prepared.embeds.shape
        # Reading a static cache's length waits for its device: not where a decoder cannot run.
        knows_none = T == 1 and isinstance(fast, str)
        if (T > 1 and B * T > MAX_ROWS) or not (knows_none or inputs.past):
            self.read_again()
            return None
        if fast is None or not (isinstance(fast, str) or fast.is_current):
            fast = find_obstacle(self.language_model) or FastDecoder(self.language_model)
            self._fast = fast
        obstacle = fast if isinstance(fast, str) else find_obstacle_of_pass(inputs, prepared)
        if obstacle is not None:
            _log.debug("a pass runs layer by layer, not by decode_step: %s", obstacle)
            return None
        return fast  # type: ignore[return-value]

    def _check(self, inputs: ModelInputs) -> None:
        """Refuse text of another kind, and arguments that this model would not read."""
        spec = self.spec
        check_text(inputs.input_ids, inputs.inputs_embeds, spec.text.hidden_size)
        check_mask(inputs.attention_mask)
        for name in ("prefix_length", "cross_attention_mask", *_OF_TILES):
            if getattr(inputs, name) is not None and not _reads(spec, name):
                raise ValueError(f"{name} must be None: this model does not read it")
        keep = inputs.logits_to_keep
        if not isinstance(keep, (int, torch.SymInt, torch.Tensor, type(None))):
            raise TypeError(
                f"logits_to_keep must be an int, a torch.Tensor or None, got {type(keep).__name__}"
            )

    def _parts(self) -> Parts:
        """What fusion asks of the model."""
        encoder = None if self.spec.encoder is None else self.vision_tower
        return Parts(self.language_model.embed_tokens, encoder, self.encode_images, self.reference)

    def _prefix_length(
        self, inputs: ModelInputs, prepared: DecoderInputs, attn_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Leading positions of each row that attend to each other in both directions."""
        if not self.spec.bidirectional_prefix or inputs.past:
            return None
        if inputs.prefix_length is not None:
            if prepared.first_key is not None and not torch.compiler.is_compiling():
                raise ValueError(
                    "prefix_length must be None where position_ids restart: token_type_ids mark "
                    "the prompt of each sequence"
                )
            return inputs.prefix_length
        if inputs.token_type_ids is None or attn_mask is not None:
            return None
        return count_prefix(
            inputs.token_type_ids,
            prepared.padding_mask,
            prepared.embeds.shape[:2],
            prepared.first_key,
        )

    def _with_logits(
        self,
        output: ModelOutput,
        decoded: DecoderOutput,
        inputs: ModelInputs,
        prepared: DecoderInputs,
    ) -> ModelOutput:
        """Add logits, if they are requested, and, with labels, the loss."""
        keep, labels = inputs.logits_to_keep, prepared.labels
        states, logits = decoded.last_hidden_state, None  # (B, T, hidden)
        head = self.lm_head
        if keep is not None:
            logits = self.compute_logits(
                states[:, -keep:] if isinstance(keep, int) else states[:, keep]
            )
        if labels is None:
            return replace(output, logits=logits)
        rest = (
            labels,
            prepared.embeds.shape[:2],
            prepared.padding_mask,
            prepared.placeholders,
            self.spec.ignore_index,
            inputs.num_items_in_batch,
        )
        if logits is not None:
            loss, count = counted_loss(logits, *rest)
        elif _takes_states(head, states):
            cap = self.spec.text.final_logit_softcapping
            loss, count = counted_loss_of_states(states, head, cap, *rest)
        else:
            loss, count = counted_loss(self.compute_logits(states), *rest)
        return replace(output, logits=logits, loss=loss, num_trained_tokens=count)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., vocabulary]."""
        return softcap(self.lm_head(hidden_states), self.spec.text.final_logit_softcapping)


def _takes_states(head: nn.Module, states: torch.Tensor) -> bool:
    """Whether a loss needs no logits of all positions: not if the head is adapted or sharded, nor
    where one that is packed rounds the states.
    """
    if is_plain(head, PackedLinear):
        return head.bias is None and head.is_trained(states)
    return is_plain(head, nn.Linear) and head.bias is None and not is_sharded(head)


def _reads(spec: ModelSpec, name: str) -> bool:
    """Whether a model reads one of the arguments that not all do."""
    if name in _OF_TILES:
        return spec.has_tiles
    if name == "prefix_length":
        return spec.bidirectional_prefix
    return bool(spec.text.cross_attention_layers)
