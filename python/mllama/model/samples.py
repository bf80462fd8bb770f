"""Random inputs for a model of any family: a row of tokens with an image, from a seed."""

from dataclasses import dataclass

import torch

from mllama.config.spec import ModelSpec
from mllama.encoders import ENCODERS
from mllama.fusion import make_fusion

_TEXT = (14, 9)  # text tokens per row
_ANSWER = 4  # of these, tokens of the answer
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "cross_attention_mask")
_IMAGES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


@dataclass(frozen=True)
class Sample:
    """One row.

    Attributes:
        inputs: the model's keyword arguments.
        length: number of tokens; 0 for pixels alone.
        prompt: number of tokens before the answer; the image is among these.
    """

    inputs: dict[str, torch.Tensor]
    length: int = 0
    prompt: int = 0

    @property
    def device(self) -> torch.device:
        """The tensors' device."""
        return next(iter(self.inputs.values())).device

    def cut(self, start: int, end: int) -> dict[str, torch.Tensor]:
        """Arguments for tokens `start` to `end`, continuing from those before; images come with
        the first slice.
        """
        cut = {
            name: value[:, start:end] for name, value in self.inputs.items() if name in _PER_TOKEN
        }
        cut["attention_mask"] = self.inputs["attention_mask"][:, :end]
        return cut | (
            {} if start else {name: self.inputs[name] for name in _IMAGES if name in self.inputs}
        )

    @staticmethod
    def join(samples: list["Sample"]) -> dict[str, torch.Tensor]:
        """Arguments for a batch of samples, padded on the left."""
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
    """Two rows of unequal lengths, each with an image if the model takes images.

    Args:
        spec: the model's spec.
        image_token: id of the image placeholder. Default: the last id of the vocabulary.
        seed: seed of the random numbers.
        device: device of the tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    if spec.text is None:
        samples = [Sample(ENCODERS[spec.encoder].sample(spec.vision, generator, 0))]
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
    # Text before the image, if the family allows it.
    lead = 0 if spec.bidirectional_prefix else 2
    places = torch.full((make_fusion(spec).placeholders_per_image,), token)
    ids = torch.cat([text[:lead], places, text[lead:]])[None]  # (1, T)
    total = ids.shape[1]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if spec.bidirectional_prefix:
        inputs["token_type_ids"] = (torch.arange(total) >= total - _ANSWER).long()[None]
    if spec.encoder is not None:
        # The two rows' images have different empty tiles.
        inputs |= ENCODERS[spec.encoder].sample(spec.vision, generator, 0 if number else 1)
    if spec.has_tiles:
        visible = (torch.arange(total) >= lead).long()
        inputs["cross_attention_mask"] = (
            visible[None, :, None, None] * inputs["aspect_ratio_mask"][:, None]
        )  # (1, T, images, tiles)
    return Sample(inputs, total, total - _ANSWER)
