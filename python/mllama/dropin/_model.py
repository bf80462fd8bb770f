"""This package's model, called as older scripts call theirs: `kv_cache` in and out."""

import warnings

import torch
from transformers import Cache, PretrainedConfig
from transformers.modeling_outputs import ModelOutput

from mllama.checkpoints.files import listing
from mllama.dropin._arguments import hands_on
from mllama.dropin._output import OlderOutput
from mllama.hf.built import remember_config
from mllama.hf.modeling import MllamaForConditionalGeneration


class OlderModel(MllamaForConditionalGeneration):
    """`mllama.MllamaForConditionalGeneration` of any family, whose cache is also called `kv_cache`.

    Attributes:
        vocab_size: the decoder's.
        config.vision_config.num_image_tokens, config.text_config.num_image_tokens: placeholders per
        picture, of a model that merges them.
    """

    def __init__(self, config: PretrainedConfig, reference: str = "meta"):
        super().__init__(config, reference)
        self.vocab_size = self.spec.text.vocab_size
        if self.spec.tokens_per_image:
            for part in (self.vision_config, self.text_config):
                part.num_image_tokens = self.spec.tokens_per_image
        remember_config(self)

    @hands_on(MllamaForConditionalGeneration.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        kv_cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> OlderOutput | tuple:
        """As `mllama.MllamaForConditionalGeneration.forward`, under two further names.

        Args:
            kv_cache: another name of `cache`: new keys and values are written to it. While it is
                empty the prompt is read; once it is filled, input_ids are what comes after, and
                pictures given again are not looked at.
            image_mask: not read; placeholders are found in input_ids.
            kwargs: further arguments of the package's.

        Returns:
            `output["logits"]`, `output["loss"]` (None without labels), `output["kv_cache"]`; all of
            them also as attributes.

        Raises:
            ValueError: the cache is given by two names; and as the package's.
            TypeError, IndexError: as the package's.
        """
        kwargs = _with_cache(kv_cache, kwargs)
        output = super().forward(
            input_ids,
            pixel_values,
            attention_mask,
            labels,
            inputs_embeds,
            position_ids=position_ids,
            **kwargs,
        )
        return OlderOutput(**output) if isinstance(output, ModelOutput) else output

    def generate(self, *args, kv_cache: Cache | None = None, **kwargs):
        """As transformers', with `kv_cache` as another name of `cache`."""
        return super().generate(*args, **_with_cache(kv_cache, kwargs))

    @property
    def text_config(self):
        """The decoder's config."""
        return self.config.get_text_config()

    @property
    def vision_config(self):
        """The tower's config."""
        return self.config.vision_config

    @property
    def ignore_index(self) -> int:
        """The label that is not trained."""
        return self.spec.ignore_index

    @property
    def image_token_index(self) -> int | None:
        """The placeholder's id, as the config says it; may be set."""
        return self.config.image_token_index

    @image_token_index.setter
    def image_token_index(self, value: int | None) -> None:
        self.config.image_token_index = value

    def tie_weights(self, *args, **kwargs) -> None:
        """Called by a script, without arguments: make the output head the embedding matrix. Called
        by transformers and this package, with
        some: as the config says."""
        if not (args or kwargs or self._resizing):
            self.config.tie_word_embeddings = True
        super().tie_weights(*args, **kwargs)

    _resizing = False

    def resize_token_embeddings(self, *args, **kwargs) -> torch.nn.Embedding:
        """As transformers', whose last step is `tie_weights()`: it ties what was tied."""
        self._resizing = True
        try:
            return super().resize_token_embeddings(*args, **kwargs)
        finally:
            self._resizing = False

    def load_state_dict(
        self, state_dict: dict[str, torch.Tensor], strict: bool = True, assign: bool = False
    ):
        """As torch's; takes the names that weight files use, older scripts' among them. Warns where
        few of the tensors find a place.
        """
        report = super().load_state_dict(state_dict, strict=strict, assign=assign)
        unknown = report.unexpected_keys
        if 2 * len(unknown) > len(state_dict) or not state_dict:
            matched = sorted(self.state_dict().keys() - set(report.missing_keys))
            warnings.warn(
                f"load_state_dict: {len(state_dict) - len(unknown)} of {len(state_dict)} tensors found a place in the model "
                f"({listing(matched) or 'none'}); not known: {listing(sorted(unknown)) or 'none'}",
                stacklevel=2,
            )
        return report


def _with_cache(kv_cache: Cache | None, kwargs: dict) -> dict:
    """Keywords with `kv_cache` among them as `cache`."""
    if kv_cache is None:
        return kwargs
    for name in ("cache", "past_key_values"):
        if kwargs.get(name) is not None:
            raise ValueError(f"kv_cache and {name} are two names of one argument; give one")
    return {name: value for name, value in kwargs.items() if name != "past_key_values"} | {
        "cache": kv_cache
    }
