"""Makes batches of examples: a model's inputs, with labels for the assistant's tokens alone."""

from collections.abc import Sequence
from typing import Any

import torch

from mllama.data.encoded import EncodedRow
from mllama.data.layouts import ImageLayout, layout_of
from mllama.data.rows import Example
from mllama.hf.processors.chat import IGNORED, chat_labels
from mllama.nn.wrappers import unwrapped
from mllama.processing.conversation import encode_messages
from mllama.processing.messages import as_text

IMAGE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")


class Collator:
    """Makes a batch of examples, padded on the right.

    What is trained are the assistant's tokens, from the end of each prompt to the end token, as
    `mllama.chat_labels` finds them for any chat template. Without a chat template, PaliGemma takes
    a question and an answer as prefix and suffix; other models take them in the form of
    `mllama.processing.conversation.encode_messages`: the prompt, then the answer's own tokens and
    the end token.

    It can be pickled, for the workers of a data loader; it does not hold the model.

    Args:
        model: the model to train, as `mllama.load` returns it; may be wrapped.
        processor: its processor or tokenizer.
        max_length: longer rows lose their last tokens; never those of images. Default: none may be
            longer than the model's positions.
        pack: put several examples into a row of at most max_length. `position_ids` restart with
            each, so that they do not attend to one another; there is no attention_mask.

    Raises:
        TypeError: max_length is not an int.
        ValueError: max_length is below 2 or beyond the model's positions; the model has no decoder;
            pack without max_length, or for a model that cannot read packed rows.
    """

    def __init__(
        self, model: Any, processor: Any, max_length: int | None = None, pack: bool = False
    ):
        model = unwrapped(model)
        spec = model.spec
        if spec.text is None:
            raise ValueError("a vision model without a decoder has no answers to train")
        limit = spec.text.max_position_embeddings
        if max_length is not None:
            if not isinstance(max_length, int) or isinstance(max_length, bool):
                raise TypeError(f"max_length must be an int, got {type(max_length).__name__}")
            if not 2 <= max_length <= limit:
                raise ValueError(f"max_length must be in 2..{limit}, got {max_length}")
        self.max_length, self.pack, self._positions = max_length, pack, limit
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._layout: ImageLayout = layout_of(spec, model.reference)
        if pack:
            if max_length is None:
                raise ValueError("pack needs max_length")
            self._layout.check_packing()
        self.image_token_id = spec.image_token_index
        if self.image_token_id is None:
            self.image_token_id = getattr(processor, "image_token_id", None)
        pad = self.tokenizer.pad_token_id
        self._pad = pad if pad is not None else self.tokenizer.eos_token_id or 0

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Returns:
            input_ids, labels [B, T] int64; attention_mask [B, T], or position_ids [B, T] of packed
            rows; for PaliGemma token_type_ids [B, T]; if there are images pixel_values, and for
            cross-attention layers cross_attention_mask, for tiles aspect_ratio_ids and
            aspect_ratio_mask. `(batch["labels"] != -100).sum()` is the number of trained tokens.

        Raises:
            ValueError: there are no examples, or one cannot be encoded (see `encode`), or the model
                needs as many images in every row.
        """
        if not examples:
            raise ValueError("a batch needs at least one example")
        encoded = [self.encode(example) for example in examples]
        rows = self._packed(encoded) if self.pack else [[one] for one in encoded]
        length = max(sum(map(len, row)) for row in rows)
        batch = {
            "input_ids": _stack(
                [[one.input_ids for one in row] for row in rows], length, self._pad
            ),
            "labels": _stack([[one.labels for one in row] for row in rows], length, IGNORED),
        }
        if self.pack:
            batch["position_ids"] = torch.stack([_positions(row, length) for row in rows])
        else:
            ones = [[torch.ones_like(one.input_ids) for one in row] for row in rows]
            batch["attention_mask"] = _stack(ones, length, 0)
        types = [
            [one.token_type_ids for one in row if one.token_type_ids is not None] for row in rows
        ]
        if types[0]:  # of a model that has them
            batch["token_type_ids"] = _stack(types, length, 0)
        return batch | self._layout.join(rows, length, self.pack)

    def encode(self, example: Example) -> EncodedRow:
        """Encode one example, at most max_length tokens of it.

        Raises:
            ValueError: the example does not fit the model (its processor, chat template or number
                of positions), an image cannot be read, or max_length cuts off the places of an
                image or every answer. The message begins with `example.where`.
        """
        try:
            return self._encode(example)
        except MemoryError:
            raise
        except Exception as error:  # templates and images fail in many ways
            expected = isinstance(error, (ValueError, TypeError, OSError)) and str(error)
            reason = expected or f"{type(error).__name__}: {error}"
            raise ValueError(f"{example.where}: {reason}") from error

    def _encode(self, example: Example) -> EncodedRow:
        self._layout.check_images(len(example.images))
        inputs = self._inputs(example.messages)
        row = EncodedRow(
            inputs["input_ids"][0],
            inputs["labels"][0],
            example.where,
            inputs["token_type_ids"][0] if "token_type_ids" in inputs else None,
            self._layout.split({k: inputs[k] for k in IMAGE_INPUTS if k in inputs}),
        )
        # Nothing comes before the first token that it could be predicted from.
        row.labels[0] = IGNORED
        if self.image_token_id is not None:
            row.labels[row.input_ids == self.image_token_id] = IGNORED
        self._truncate(row)
        if not bool((row.labels != IGNORED).any()):
            raise ValueError("no token of an answer is left to train; raise max_length")
        return row

    def _inputs(self, messages: list[dict]) -> Any:
        if self._layout.bidirectional or self.processor.chat_template is not None:
            return chat_labels(self.processor, [messages])
        return _plain_form(self.processor, self.tokenizer, messages)

    def _truncate(self, row: EncodedRow) -> None:
        total, limit = len(row), self._positions - self._layout.tokens_before(row)
        if self.max_length is None and total > limit:
            raise ValueError(f"it has {total} tokens, the model has {limit} positions for them")
        most = min(limit, self.max_length or limit)
        if total <= most:
            return
        if self.image_token_id is not None and (row.input_ids[most:] == self.image_token_id).any():
            raise ValueError(
                f"max_length {most} cuts off places of images, of {total} tokens: raise it"
            )
        row.truncated = total - most
        row.input_ids, row.labels = row.input_ids[:most], row.labels[:most]
        if row.token_type_ids is not None:
            row.token_type_ids = row.token_type_ids[:most]
        if "cross_attention_mask" in row.images:
            row.images["cross_attention_mask"] = row.images["cross_attention_mask"][:most]

    def _packed(self, encoded: list[EncodedRow]) -> list[list[EncodedRow]]:
        """Each example in the first row that has room for it."""
        rows: list[list[EncodedRow]] = []
        for one in encoded:
            for row in rows:
                if sum(map(len, row)) + len(one) <= self.max_length:  # type: ignore[operator]
                    row.append(one)
                    break
            else:
                rows.append([one])
        return rows


def _plain_form(processor: Any, tokenizer: Any, messages: list[dict]) -> dict[str, torch.Tensor]:
    """A question and an answer without a chat template."""
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"]:
        raise ValueError(
            "the processor has no chat template: a row must be one question and one answer, got "
            f"{', '.join(roles)}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has neither a chat template nor an end token")
    inputs = dict(encode_messages(processor, messages[:1]))
    answer = tokenizer.encode(as_text(messages[1]["content"]), add_special_tokens=False)
    added = torch.tensor([[*answer, tokenizer.eos_token_id]], device="cpu")
    prompt = inputs["input_ids"]
    inputs["labels"] = torch.cat([torch.full_like(prompt, IGNORED), added], 1)
    inputs["input_ids"] = torch.cat([prompt, added], 1)
    if (mask := inputs.get("cross_attention_mask")) is not None:
        shown = mask[:, -1:].expand(-1, added.shape[1], -1, -1)
        inputs["cross_attention_mask"] = torch.cat([mask, shown], 1)
    return inputs


def _stack(rows: list[list[torch.Tensor]], length: int, padding: int) -> torch.Tensor:
    """Parts of rows, [tokens] each -> [rows, length]."""
    padded = torch.full((len(rows), length), padding, device="cpu")
    for row, parts in zip(padded, rows, strict=True):
        whole = torch.cat(parts)
        row[: len(whole)] = whole
    return padded


def _positions(row: list[EncodedRow], length: int) -> torch.Tensor:
    """int64 [length], from 0 in each example; padding is a sequence of its own."""
    lengths = [len(one) for one in row]
    return torch.cat([torch.arange(n, device="cpu") for n in (*lengths, length - sum(lengths))])
