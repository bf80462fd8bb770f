"""A vision-language model put together: tower -> projector -> merge at the placeholders -> decoder -> head."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Cache, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import slice_logits_to_keep

from mllama.config import MllamaConfig
from mllama.fusion.merge import find_placeholder, merge
from mllama.fusion.projector import MultiModalProjector
from mllama.generation import MllamaGenerationMixin
from mllama.text.cache import check_cache
from mllama.text.decoder import Decoder, check_mask
from mllama.towers.siglip import SiglipVisionTower

_HUB_OPTIONS = {
    "_from_auto",
    "adapter_kwargs",
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "revision",
    "token",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
}


@dataclass
class MllamaOutput(ModelOutput):
    """What the model returns; readable as `output.logits`, `output["logits"]` and by place. What is None is left out.

    Attributes:
        loss: float32 scalar, where labels were given.
        logits: [B, T, vocabulary], in the model's dtype.
        past_key_values: the cache, where one was used.
        hidden_states: the decoder's, layers + 1 of [B, T, hidden].
        attentions: the decoder's, one [B, heads, T, keys] float32 per layer.
        image_hidden_states: projected features [pictures, patches, hidden].
        image_attentions: the tower's, one [pictures, heads, patches, patches] float32 per layer.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    image_attentions: tuple[torch.Tensor, ...] | None = None


class MllamaForConditionalGeneration(MllamaGenerationMixin, PreTrainedModel):
    """Answers about pictures: a SigLIP tower and a Llama decoder joined by early fusion.

    Built from a `MllamaConfig` with random weights, or from a folder by `from_pretrained`.
    """

    config_class = MllamaConfig
    config: MllamaConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["SiglipEncoderLayer", "DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}

    def __init__(self, config: MllamaConfig):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_tower = SiglipVisionTower(vision)
        self.multi_modal_projector = MultiModalProjector(
            vision.hidden_size, config.projection_dim, text.hidden_size, config.projector_hidden_act, config.multimodal_projector_bias
        )
        self.language_model = Decoder(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: MllamaConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | dict | None = None,
        subfolder: str | os.PathLike = "",
        **kwargs,
    ) -> "MllamaForConditionalGeneration":
        """Load a model folder: Hugging Face's LLaVA (SigLIP + Llama), or our own format. The model is in eval mode.

        Args:
            pretrained_model_name_or_path: the folder, with config.json and safetensors weights.
            config: takes the place of the folder's.
            dtype: "auto" (the default) is the files' own; or float32, bfloat16, float16. `torch_dtype` is its older name.
            device_map: a device, {"": device}, or "auto" for the GPU where there is one; the CPU by default.
            subfolder: the model's place inside the folder.
            kwargs: options of transformers that say how to fetch a model from its hub are taken and change nothing for a folder.

        Raises:
            FileNotFoundError: no folder, config or safetensors weights there.
            ValueError: an unknown `model_type`, a broken file, or weights that do not fit: every missing and unexpected tensor, and every
                wrong shape, in one error. A `subfolder` outside the folder.
            TypeError: an option that is not known, a config of another kind.
        """
        from mllama.checkpoints import load_model

        if dtype is None:
            dtype = kwargs.pop("torch_dtype", None) or "auto"
        if isinstance(device_map, dict):
            if list(device_map) != [""]:
                raise ValueError(f"device_map must name one device for the whole model, got {device_map!r}")
            device_map = device_map[""]
        if device_map == "auto":
            device_map = "cuda" if torch.cuda.is_available() else "cpu"
        if unknown := sorted(kwargs.keys() - _HUB_OPTIONS):
            raise TypeError(f"from_pretrained got options it does not know: {', '.join(unknown)}")
        inner = Path(subfolder or "")
        if inner.is_absolute() or ".." in inner.parts:
            raise ValueError(f"subfolder must lie inside the model folder, got {str(subfolder)!r}")
        folder = Path(pretrained_model_name_or_path) / inner
        return load_model(cls, folder, config, dtype, "cpu" if device_map is None else device_map)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        **kwargs,
    ) -> None:
        """Write the model to a folder, whole or not at all. Signature as transformers'.

        A model that Hugging Face's LLaVA can be (`vision_feature="pre_norm"`, projection_dim equal to the decoder's width, and an
        `image_token_index` within the vocabulary) is written as LLaVA; any other in our own format.

        Args:
            save_directory: made if absent; other files in it stay.
            is_main_process: False writes nothing.
            state_dict: takes the place of the model's own; it must have all of its names.
            push_to_hub: afterwards upload the folder, to `repo_id` (the folder's name by default).
            max_shard_size: bytes of one weight file, or text as "5GB"; more is written as shards and an index.

        Raises:
            ValueError: a `state_dict` that is not the whole model; `variant` or `safe_serialization=False`, which would change what is
                written and are not supported.
        """
        from mllama.checkpoints import save_model

        if kwargs.get("variant") is not None:
            raise ValueError(f"variant is not supported: weights have one name; got {kwargs['variant']!r}")
        if not kwargs.get("safe_serialization", True):
            raise ValueError("safe_serialization must be True: weights are written as safetensors only")
        if is_main_process:
            save_model(self, save_directory, state_dict, max_shard_size)
            if push_to_hub:
                self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), token=kwargs.get("token"))

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As torch's; takes the names that weight files use too, whole or shard by shard with `strict=False`."""
        from mllama.checkpoints import translate_state_dict

        report = super().load_state_dict(translate_state_dict(self, state_dict), strict=strict, assign=assign)
        if assign:  # it gave every name a parameter of its own
            self.tie_weights()
        return report

    def get_input_embeddings(self) -> nn.Embedding:
        """The decoder's embedding matrix."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another embedding matrix in place."""
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode and project pictures.

        Args:
            pixel_values: float [pictures, channels, image_size, image_size].

        Returns:
            [pictures, patches, text hidden size]; `forward` and `generate` take it as `image_features` in place of the pixels.

        Raises:
            TypeError, ValueError: as the tower.
        """
        return self._encode(pixel_values)[0]

    def _encode(self, pixel_values: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor, tuple | None]:
        final_norm = self.config.vision_feature == "last"
        encoded = self.vision_tower(pixel_values, output_attentions=output_attentions, final_norm=final_norm)
        return self.multi_modal_projector(encoded.last_hidden_state), encoded.attentions

    def find_placeholders(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, pictures: int = 0) -> torch.Tensor:
        """Where picture placeholders stand: bool [B, T].

        With `config.image_token_index` these are the positions that hold it. Without, the id is told by `fusion.merge.find_placeholder`
        from the runs it stands in at unmasked positions; where none stands so, no position is one.

        Args:
            input_ids: int [B, T].
            attention_mask: [B, T], zero where padded, or None.
            pictures: how many pictures the batch has.

        Raises:
            ValueError: the id is not set, and more than one could be it.
        """
        token = self.config.image_token_index
        if token is not None:
            return input_ids == token
        if pictures:
            token = find_placeholder(input_ids, attention_mask, self.config.text_config.num_image_tokens, pictures)
        if token is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == token if attention_mask is None else (input_ids == token) & (attention_mask != 0)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_features: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> MllamaOutput | tuple:
        """
        Args:
            input_ids: int [B, T], with one placeholder per feature. Placeholder ids may lie outside the vocabulary.
            pixel_values: float [pictures of the batch in row order, channels, image_size, image_size]; cast to the tower's dtype. With a
                filled cache and no placeholders in input_ids they are ignored.
            attention_mask: [B, past + T] of any dtype, zero where padded, on either side.
            labels: int [B, T], shifted inside: the logits at t are scored against the label at t + 1. `config.ignore_index`, placeholder
                and padding positions are not trained.
            inputs_embeds: [B, T, hidden] in place of input_ids; pictures must be merged already.
            past_key_values: a transformers cache, dynamic or static.
            position_ids: int [B or 1, T]. None counts the unmasked tokens of each row.
            use_cache: return a cache; None asks for one outside training, as the decoder's config says.
            output_attentions, output_hidden_states: also return what `MllamaOutput` says.
            logits_to_keep: last positions to compute logits for (0: all), or which ones, as transformers takes it.
            image_features: what `get_image_features` gave, in place of pixel_values.
            return_dict: False returns a tuple.
            kwargs: `num_items_in_batch`, the labels of the whole (accumulated) batch, makes the loss their sum divided by it instead of
                their mean. Anything else is passed over, as in transformers.

        Raises:
            ValueError: shapes that do not fit, placeholders that are not as many as features, labels out of range.
            TypeError: tensors of a wrong kind.
            IndexError: an id outside the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        check_cache(past_key_values)
        check_mask(attention_mask)
        config = self.config
        output_attentions = bool(config.output_attentions if output_attentions is None else output_attentions)
        output_hidden_states = bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        use_cache = config.text_config.use_cache and not self.training if use_cache is None else use_cache

        placeholders = image_attentions = None
        if inputs_embeds is None:
            _check_ids(input_ids)
            if attention_mask is not None and attention_mask.shape[0] != input_ids.shape[0]:
                raise ValueError(f"attention_mask must have {input_ids.shape[0]} rows, as input_ids, got {attention_mask.shape[0]}")
            pictures = self._count_pictures(pixel_values, image_features)
            filled = past_key_values is not None and int(past_key_values.get_seq_length()) > 0
            if pictures or not filled:
                placeholders = self._placeholders(input_ids, attention_mask, pictures, filled)
            if placeholders is None:
                pixel_values = image_features = None
            elif pixel_values is not None:
                image_features, image_attentions = self._encode(pixel_values, output_attentions)
            inputs_embeds = self._embed(input_ids, placeholders, image_features)
        elif pixel_values is not None or image_features is not None:
            raise ValueError("pictures need input_ids, whose placeholders tell where they stand; inputs_embeds must hold them already")

        decoded = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(slice_logits_to_keep(decoded.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, inputs_embeds.shape[:2], attention_mask, placeholders, kwargs.get("num_items_in_batch"))

        output = MllamaOutput(
            loss=loss,
            logits=logits,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            image_hidden_states=image_features,
            image_attentions=image_attentions,
        )
        if return_dict is None:
            return_dict = config.return_dict
        return output if return_dict else output.to_tuple()

    def _count_pictures(self, pixel_values: torch.Tensor | None, image_features: torch.Tensor | None) -> int:
        if pixel_values is not None and image_features is not None:
            raise ValueError("give pixel_values or image_features, not both")
        if pixel_values is not None:
            self.vision_tower.check(pixel_values)
            return pixel_values.shape[0]
        if image_features is None:
            return 0
        if not isinstance(image_features, torch.Tensor):
            raise TypeError(f"image_features must be a torch.Tensor, got {type(image_features).__name__}")
        wanted = [self.config.text_config.num_image_tokens, self.config.text_config.hidden_size]
        if list(image_features.shape[1:]) != wanted:
            raise ValueError(f"image_features must be [pictures, {wanted[0]}, {wanted[1]}], got {list(image_features.shape)}")
        return image_features.shape[0]

    def _placeholders(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pictures: int, filled: bool = False
    ) -> torch.Tensor | None:
        """bool [B, T] with as many True as there are features; None where a filled cache already holds the pictures given again."""
        if attention_mask is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        placeholders = self.find_placeholders(input_ids, attention_mask, pictures)
        if torch.compiler.is_compiling():
            return placeholders
        per_picture = self.config.text_config.num_image_tokens
        rows = placeholders.sum(1).tolist()
        found = sum(rows)
        if filled and not found:
            return None
        if found != pictures * per_picture:
            unexpanded = "; expand each <image> with the processor (MllamaImageProcessor)" if found <= pictures else ""
            raise ValueError(
                f"input_ids hold {found} picture placeholders, but {pictures} pictures give {pictures * per_picture} features{unexpanded}"
            )
        if any(row % per_picture for row in rows):
            raise ValueError(f"every row must hold a multiple of {per_picture} picture placeholders, got {rows}")
        return placeholders

    def _embed(self, input_ids: torch.Tensor, placeholders: torch.Tensor | None, image_features: torch.Tensor | None) -> torch.Tensor:
        """[B, T, hidden]: looked-up ids, with the features at the placeholders."""
        embedding = self.get_input_embeddings()
        if placeholders is not None:
            input_ids = input_ids.masked_fill(placeholders, 0)
        _check_range(input_ids, embedding.num_embeddings)
        inputs_embeds = embedding(input_ids)
        return inputs_embeds if image_features is None else merge(inputs_embeds, placeholders, image_features)

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        shape: torch.Size,
        attention_mask: torch.Tensor | None,
        placeholders: torch.Tensor | None,
        num_items_in_batch: int | torch.Tensor | None,
    ) -> torch.Tensor:
        """Next-token cross entropy in float32: mean over the trained positions, or their sum over `num_items_in_batch`."""
        ignored = self.config.ignore_index
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be an integer torch.Tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
        if labels.shape != shape:
            raise ValueError(f"labels must be {list(shape)}, one per token, got {list(labels.shape)}")
        if logits.shape[:2] != shape:
            raise ValueError("labels need the logits of every position; leave logits_to_keep at 0")
        labels = labels.to(logits.device, torch.long)
        if placeholders is not None:
            labels = labels.masked_fill(placeholders, ignored)
        labels = labels[:, 1:]
        if attention_mask is not None:  # a padded position is neither a target nor a place to predict from
            seen = attention_mask[:, -shape[1] :] != 0
            labels = labels.masked_fill(~(seen[:, 1:] & seen[:, :-1]), ignored)
        trained = labels != ignored
        vocabulary = logits.shape[-1]
        if not torch.compiler.is_compiling() and bool((trained & ((labels < 0) | (labels >= vocabulary))).any()):
            raise ValueError(
                f"labels must be {ignored} or within the vocabulary (0 to {vocabulary - 1}), got {labels.min()} to {labels.max()}"
            )
        total = nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, vocabulary).float(), labels.reshape(-1), ignore_index=ignored, reduction="sum"
        )
        count = trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)


def _check_ids(input_ids: torch.Tensor) -> None:
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be an int64 or int32 torch.Tensor, got {getattr(input_ids, 'dtype', type(input_ids).__name__)}")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be [batch, tokens] with at least one token, got {list(input_ids.shape)}")


def _check_range(input_ids: torch.Tensor, vocabulary: int) -> None:
    """An id outside the embedding matrix is an IndexError on every device, instead of a device-side assertion on some."""
    if torch.compiler.is_compiling() or input_ids.numel() == 0 or input_ids.is_meta:
        return
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise IndexError(f"input_ids must lie within the vocabulary (0 to {vocabulary - 1}), got {low} to {high}")


# The mapping is by class, but refuses a class whose name one of transformers' own bears; theirs stays what it was.
AutoModelForImageTextToText.register(MllamaConfig, MllamaForConditionalGeneration, exist_ok=True)
