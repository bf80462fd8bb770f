"""Decoding by a captured pass: from the last token of each row to its next one, by one launch."""

import logging
import os
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.nn.functional import pad

from mllama.fusion.base import DecoderInputs, ModelInputs
from mllama.model.fast_decoder import FastDecoder
from mllama.nn.plain import all_plain
from mllama.nn.static_cache import StaticCache
from mllama.runtime.fingerprint import is_foreign, versions
from mllama.runtime.sampler import Sampler, Sampling, select_again
from mllama.runtime.step_graph import HostCopy, graph_class
from mllama.text.decoder import count_positions

_log = logging.getLogger(__name__)


@dataclass
class StepTensors:
    """What a pass reads, and writes for the next one, on the model's device.

    Attributes:
        ids: int64 [B, 1], the last tokens.
        positions: int64 [B, 1], theirs.
        length: int64 [1], positions in the cache.
        key_mask: bool [B, capacity], False where padded; None where nothing is.
        image_mask: bool [B, image keys], the visible ones; None: all.
        sees_image: bool [B, 1, 1], False where a row sees no image; None: all see one.
        uniform: float64 [B], numbers to draw with; None for greedy decoding.
        present: bool [B, V], tokens that occurred; None without a repetition penalty.
        selected: int64 [B], the next tokens; -1 where a row's logits are no distribution.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    length: torch.Tensor
    key_mask: torch.Tensor | None
    image_mask: torch.Tensor | None
    sees_image: torch.Tensor | None
    uniform: torch.Tensor | None
    present: torch.Tensor | None
    selected: torch.Tensor

    @classmethod
    def of(
        cls,
        tokens: torch.Tensor,
        prepared: DecoderInputs,
        cache: StaticCache,
        present: torch.Tensor | None,
        greedy: bool,
    ) -> "StepTensors":
        """Those of the first pass after a prompt, which appends `tokens`, int64 [B]."""
        B, mask, cross = len(tokens), prepared.padding_mask, prepared.cross
        positions = prepared.position_ids
        if positions is None:
            positions = count_positions(mask, 1, cache.length, tokens.device)
        if mask is not None:  # slots that are not written yet are hidden by causality
            mask = pad(mask != 0, (0, cache.num_keys(1) - mask.shape[1]), value=True)
        segments = None if cross is None else cross.segments
        return cls(
            ids=tokens[:, None],
            positions=positions.expand(B, 1),
            length=cache.length,
            key_mask=mask,
            image_mask=segments[0].key_mask if segments else None,
            sees_image=None if cross is None else cross.visible,
            uniform=None if greedy else tokens.new_zeros(B, dtype=torch.float64),
            present=present,
            selected=tokens,
        )

    def items(self) -> list[tuple[str, torch.Tensor]]:
        """Names and tensors, of those that are there."""
        all_of_them = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [(name, tensor) for name, tensor in all_of_them if tensor is not None]

    def shapes(self) -> tuple:
        """What a captured pass takes for granted."""
        return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in self.items())

    def copy(self) -> "StepTensors":
        """Tensors of its own, with these values."""
        copies = {name: tensor.clone() for name, tensor in self.items()}
        return replace(self, **copies)

    def load(self, other: "StepTensors") -> None:
        """Take over the values of another one of the same shapes."""
        for name, tensor in self.items():
            tensor.copy_(getattr(other, name))


@dataclass
class Step:
    """One pass with the selection of the next tokens. Running it again appends these.

    Attributes:
        model: a `VisionLanguageModel`.
        tensors: static.
        prepared, fast: as the model's `start_decoding` returned them.
        cache: `tensors.length` is its own.
        sampling: how tokens are selected.
    """

    model: Any
    tensors: StepTensors
    prepared: DecoderInputs
    fast: FastDecoder | None
    cache: StaticCache
    sampling: Sampling

    def __post_init__(self) -> None:
        """Let everything that is read be static."""
        static, cross = self.tensors, self.prepared.cross
        self.cache.length = static.length
        if cross is not None:
            segments = cross.segments and (replace(cross.segments[0], key_mask=static.image_mask),)
            cross = replace(cross, segments=segments, visible=static.sees_image)
        self.prepared = replace(
            self.prepared, position_ids=static.positions, padding_mask=static.key_mask, cross=cross
        )

    def run(self) -> None:
        """What is captured: it reads nothing on the host."""
        own = self.tensors
        logits = self.model.decode(own.ids, self.prepared, self.fast, self.cache)  # (B, V)
        tokens = select_again(logits, self.sampling, own.uniform, own.present)  # (B,)
        own.selected.copy_(tokens)
        own.ids.copy_(tokens[:, None].clamp(min=0))
        own.positions.add_(1)


class DecodeGraph:
    """The captured pass of a session. It is kept as long as its tensors stay where they are: the
    cache's buffers, with the batch's size, and the model's weights.

    The host reads tokens one pass behind, so that the device does not wait for it: a pass runs for
    nothing after the last token, and of numbers without a seed one more is drawn.

    Args:
        model: a `VisionLanguageModel`.
    """

    def __init__(self, model: Any):
        self._model = model
        self.drop()

    def drop(self) -> None:
        """Release the captured pass and the tensors that it holds."""
        self._key: tuple | None = None
        self._step: Step | None = None
        self._graph: Any = None

    def find_obstacle(self, device: torch.device) -> str | None:
        """Why passes of the model on a device cannot be captured; None if they can."""
        if graph_class(device) is None:
            return f"it is on {device}"
        if os.environ.get("MLLAMA_DISABLE_GRAPHS", "0") == "1":
            return "MLLAMA_DISABLE_GRAPHS=1 is set"
        if self._model.training or torch.is_autocast_enabled(device.type):
            return "it is in training mode or under autocast"
        parts = self._model.language_model, self._model.lm_head
        if not all(map(all_plain, parts)):
            return "a module of it has a hook, or another forward than its class"
        if any(is_foreign(module) for part in parts for module in part.modules()):
            return "a module of it is another library's"
        tensors = (x for part in parts for x in (*part.parameters(), *part.buffers()))
        if any(x.device != device for x in tensors):
            return "its weights are on several devices"
        return None

    def start(
        self, tokens: torch.Tensor, inputs: ModelInputs, sampler: Sampler, passes: int
    ) -> None:
        """Get ready to append tokens to a prompt, where `find_obstacle` finds nothing.

        Args:
            tokens: int64 [B], the first ones.
            inputs: the pass that appends them, with a `KVCache` that has the prompt.
            sampler: selects the next ones.
            passes: how many there will be at most.
        """
        text, options = self._model.spec.text, replace(sampler.sampling, seed=None)
        prepared, fast = self._model.start_decoding(inputs)
        cache = StaticCache(inputs.cache, passes, text.cross_attention_layers)
        present = sampler.find_present(text.vocab_size)
        first = StepTensors.of(tokens, prepared, cache, present, options.greedy)
        segments = None if prepared.cross is None else prepared.cross.segments
        key = (
            first.shapes(),
            tuple((x.data_ptr(), x.shape) for x in (*cache.keys, *cache.values)),
            versions(self._model.language_model),
            versions(self._model.lm_head),
            options,
            fast is None,
            prepared.cross is None,
            segments and segments[0].blind,
        )
        if key != self._key:
            self.drop()
            kind = graph_class(tokens.device)
            assert kind is not None
            step = Step(self._model, first.copy(), prepared, fast, cache, options)
            try:
                self._graph = kind(step.run, tokens.device)
            except RuntimeError as error:
                error.add_note(
                    "A pass could not be captured as a CUDA graph. MLLAMA_DISABLE_GRAPHS=1 decodes "
                    "without graphs."
                )
                raise
            self._step, self._key = step, key
            _log.debug("a pass of %d rows was captured", len(tokens))
        assert self._step is not None
        self._step.tensors.load(first)
        self._sampler, self._cache = sampler, inputs.cache

    def launch(self) -> HostCopy:
        """Append the last tokens; the next ones, int64 [B], are on their way to the host."""
        own = self._step.tensors  # type: ignore[union-attr]
        if own.uniform is not None:
            own.uniform.copy_(self._sampler.draw_uniform(own.uniform.device))
        self._graph.replay()
        self._cache.advance(1)
        return HostCopy(own.selected)
