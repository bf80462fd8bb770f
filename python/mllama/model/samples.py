"""Random inputs that a model of any family takes: a row of tokens with a picture, from a seed."""

from dataclasses import dataclass

import torch

from mllama.config.spec import ModelSpec
from mllama.fusion import make_fusion

_TEXT = (14, 9)  # tokens of text in each row
_ANSWER = 4  # of them after the prompt
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "cross_attention_mask")
_PICTURES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


@dataclass(frozen=True)
class Sample:
    """One row.

    Attributes:
        inputs: the model's arguments.
        length: its tokens, 0 of pixels alone.
        prompt: how many of them come before the answer; a picture stands among these.
    """

    inputs: dict[str, torch.Tensor]
    length: int = 0
    prompt: int = 0

    @property
    def device(self) -> torch.device:
        """Of the tensors."""
        return next(iter(self.inputs.values())).device

    def cut(self, start: int, end: int) -> dict[str, torch.Tensor]:
        """The arguments for the tokens of `start` to `end` after those before; pictures come with
        the first.
        """
        cut = {
            name: value[:, start:end] for name, value in self.inputs.items() if name in _PER_TOKEN
        }
        cut["attention_mask"] = self.inputs["attention_mask"][:, :end]
        return cut | (
            {} if start else {name: self.inputs[name] for name in _PICTURES if name in self.inputs}
        )

    @staticmethod
    def join(samples: list["Sample"]) -> dict[str, torch.Tensor]:
        """The arguments for a batch of rows, padded on the left."""
        longest = max(sample.length for sample in samples)
        joined = {}
        for name in samples[0].inputs:
            values = [sample.inputs[name] for sample in samples]
            if name in _PER_TOKEN:
                pads = [longest - sample.length for sample in samples]
                values = [
                    torch.cat([value.new_zeros(1, pad, *value.shape[2:]), value], 1)
                    for value, pad in zip(values, pads, strict=True)
                ]
            joined[name] = torch.cat(values)
        return joined


def make_samples(
    spec: ModelSpec, image_token: int | None, seed: int, device: torch.device
) -> list[Sample]:
    """Two rows of unequal lengths, each with a picture of its own where the model takes pictures.

    Args:
        spec: the model's.
        image_token: the id of a picture's placeholder; None is the vocabulary's last.
        seed: of the random numbers.
        device: of the tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    if spec.text is None:
        samples = [Sample({"pixel_values": _pixels(spec, generator)})]
    else:
        token = spec.text.vocab_size - 1 if image_token is None else image_token
        samples = [_row(spec, token, number, generator) for number in range(len(_TEXT))]
    return [
        Sample(
            {name: value.to(device) for name, value in sample.inputs.items()},
            sample.length,
            sample.prompt,
        )
        for sample in samples
    ]


def _row(spec: ModelSpec, token: int, number: int, generator: torch.Generator) -> Sample:
    text = torch.randint(1, spec.text.vocab_size, (_TEXT[number],), generator=generator)
    text[text == token] = 0
    lead = (
        0 if spec.bidirectional_prefix else 2
    )  # text before the picture, where the family has such
    shown = make_fusion(spec).placeholders_per_image
    ids = torch.cat([text[:lead], torch.full((shown,), token), text[lead:]])[None]
    total = ids.shape[1]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if spec.bidirectional_prefix:
        inputs["token_type_ids"] = (torch.arange(total) >= total - _ANSWER).long()[None]
    if spec.fusion is not None and not spec.has_tiles:
        inputs["pixel_values"] = _pixels(spec, generator)
    if spec.has_tiles:
        inputs |= _tiles(spec, generator, 0 if number else 1)
        seen = (torch.arange(total) >= lead).long()
        inputs["cross_attention_mask"] = (
            seen[None, :, None, None] * inputs["aspect_ratio_mask"][:, None]
        )
    return Sample(inputs, total, total - _ANSWER)


def _pixels(spec: ModelSpec, generator: torch.Generator) -> torch.Tensor:
    vision = spec.vision
    return torch.randn(
        1, vision.num_channels, vision.image_size, vision.image_size, generator=generator
    )


def _tiles(
    spec: ModelSpec, generator: torch.Generator, arrangement: int
) -> dict[str, torch.Tensor]:
    """A picture in one of the arrangements of tiles that the config lists. The first ones leave
    tiles empty.
    """
    vision = spec.vision
    arrangement = min(arrangement, len(vision.supported_aspect_ratios) - 1)
    height, width = vision.supported_aspect_ratios[arrangement]
    filled = (torch.arange(vision.max_num_tiles) < height * width).long()[None, None]
    pixels = torch.randn(
        1,
        1,
        vision.max_num_tiles,
        vision.num_channels,
        vision.image_size,
        vision.image_size,
        generator=generator,
    )
    return {
        "pixel_values": pixels * filled[..., None, None, None],
        "aspect_ratio_ids": torch.tensor([[arrangement + 1]]),
        "aspect_ratio_mask": filled,
    }
