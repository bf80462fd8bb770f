"""`MLLAMAConfig`: the configuration of older scripts' SigLIP + Llama model."""

from typing import Any

from transformers import PretrainedConfig

from mllama.config.checks import check_choice
from mllama.dropin._text_config import LLAMA32Config
from mllama.hf.configs import MllamaConfig
from mllama.ops._dispatch import FLOAT_DTYPES


class _Unsaid(int):
    """A number that nobody gave: what `image_token_index` reads as where a script does not say it."""


IMAGE_TOKEN_INDEX = _Unsaid(128256)


def is_unsaid(image_token_index: int | None) -> bool:
    """Whether a script left the placeholder's id to be found."""
    return image_token_index is None or isinstance(image_token_index, _Unsaid)


class MLLAMAConfig(MllamaConfig):
    """A SigLIP tower, one linear layer and a Llama decoder, joined by early fusion.

    Args:
        vision_config: dict or config of the tower. None: SigLIP-base's sizes.
        text_config: dict or config of the decoder; what a dict leaves out is as `LLAMA32Config` has
            it. None: Llama 3.2 1B's sizes, with `vocab_size` and `hidden_size`.
        ignore_index: label that is not trained.
        image_token_index: id of the `<image>` placeholder. Unless it is given here or set later,
            the model finds it, as the id standing in runs of `text_config.num_image_tokens`.
        vocab_size: of a decoder that does not say its own.
        projection_dim: kept to be read; the projector leads to the decoder's width. None reads as
            that.
        hidden_size: of the decoder where there is no text_config. It reads as the decoder's.
        pad_token_index: padding id of a decoder that does not say its own.
        kwargs: as `mllama.MllamaConfig`. `dtype` is what the model's weights are made in; the
            decoder's by default.

    Attributes:
        text_config.num_image_tokens: placeholders per picture, `(image_size // patch_size) ** 2`.

    Raises:
        ValueError: a size or a choice that cannot be; the text names the field.
        TypeError: a sub-config that is neither dict nor config.
    """

    keys_to_ignore_at_inference = [*MllamaConfig.keys_to_ignore_at_inference, "kv_cache"]

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        ignore_index: int = -100,
        image_token_index: int | None = IMAGE_TOKEN_INDEX,
        vocab_size: int = 128256,
        projection_dim: int | None = 2048,
        hidden_size: int = 2048,
        pad_token_index: int | None = None,
        **kwargs,
    ):
        text = (
            {"vocab_size": vocab_size, "hidden_size": hidden_size}
            if text_config is None
            else _fields("text_config", text_config)
        )
        if isinstance(text, dict):
            text = LLAMA32Config(
                **{"vocab_size": vocab_size, "pad_token_index": pad_token_index} | text
            )
        super().__init__(
            vision_config=None
            if vision_config is None
            else _fields("vision_config", vision_config),
            text_config=text,
            ignore_index=ignore_index,
            image_token_index=IMAGE_TOKEN_INDEX if image_token_index is None else image_token_index,
            projection_dim=projection_dim if kwargs.get("projector") == "mlp" else None,
            **{"projector": "linear"} | kwargs,
        )
        if projection_dim is not None:
            self.projection_dim = projection_dim
        self.vision_config.projection_dim = self.projection_dim
        if self.dtype is None:
            self.dtype = self.text_config.dtype
        check_choice(type(self).__name__, "dtype", self.dtype, (*FLOAT_DTYPES, None))

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `mllama.MllamaConfig`'s, for every folder it reads: what such a folder leaves out is
        as that class has it.
        """
        content, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return {"projector": "mlp", "projection_dim": None} | content, unused

    def to_dict(self) -> dict[str, Any]:
        """As transformers'; `mllama.MllamaConfig` takes it too: a placeholder's id that was not
        said is None, and the projector's width is the one it has."""
        content = super().to_dict()
        if is_unsaid(self.image_token_index):
            content["image_token_index"] = None
        if self.projector == "linear":
            content["projection_dim"] = self.text_config.hidden_size
        return content

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: as `mllama.MllamaConfig` writes it, which is what reads
        it.
        """
        return MllamaConfig(**self.to_dict()).to_diff_dict()


def _fields(owner: str, given: Any) -> dict[str, Any] | PretrainedConfig:
    """What a sub-config says: a dict, a config object, or any other object by its attributes."""
    if isinstance(given, (dict, PretrainedConfig)):
        return given
    if not hasattr(given, "__dict__"):
        raise TypeError(
            f"{owner} must be a dict, a config object or None, got {type(given).__name__}"
        )
    return dict(vars(given))
