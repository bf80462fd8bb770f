"""Loading and saving of the package's models: transformers' methods on our checkpoints."""

import copy
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import distributed
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from mllama.checkpoints.files import listing
from mllama.config.checks import check_choice
from mllama.families import stock_prefixes
from mllama.hf.built import check_built
from mllama.hf.configs import NO_PREDICTIONS
from mllama.hf.peft_config import PeftConfigMixin
from mllama.lora.adapters import own_adapters
from mllama.lora.layer import lora_layers
from mllama.lora.loading import load_adapters
from mllama.lora.peft import adapted_model, is_peft
from mllama.lora.reading import saved_adapters
from mllama.lora.saving import save_adapter_folders
from mllama.lora.state import merge_and_unload
from mllama.nn.checkpointing import CheckpointedLayer
from mllama.nn.wrappers import given_out, is_sharded, may_write, plain_key, whole
from mllama.quant.packer import optimize, packing_of, tie_packed
from mllama.weights.stock_names import stock_name, stock_patterns

if TYPE_CHECKING:  # a mixin of that class, not a subclass: its own methods take precedence
    _Model = PreTrainedModel
else:
    _Model = object


def own_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config, copied if it belongs to a stock model, with our only attention implementation,
    "eager".

    It lists our outputs that are not predictions; transformers' configs list those of its own
    models.
    """
    ignored = getattr(config, "keys_to_ignore_at_inference", ())
    more = [name for name in NO_PREDICTIONS if name not in ignored]
    kind = config._attn_implementation
    if kind not in (None, "eager") or (more and kind is not None):
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
    if more:
        config.keys_to_ignore_at_inference = [*ignored, *more]
    return config


class PretrainedMixin(PeftConfigMixin, _Model):
    """`from_pretrained`, `save_pretrained` and `load_state_dict` of a PreTrainedModel, for every
    format of `mllama.checkpoints`.
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | dict | None = None,
        subfolder: str | os.PathLike = "",
        weights: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model, in eval mode.

        Args:
            pretrained_model_name_or_path: a folder with config.json and safetensors weights (LLaVA,
                PaliGemma, Llama-3.2-Vision, Llama, Gemma, SigLIP, or our own format), a folder with
                Meta's own files, a GGUF file, a folder of adapters in PEFT's format that names its
                base model, or a model id on the hub.
            config: replaces the folder's.
            dtype: "auto" (the default) is the files' own; or float32, bfloat16, float16.
                `torch_dtype` is its older name.
            device_map: a device; or accelerate's "auto", "balanced", "balanced_low_0",
                "sequential" or {module: device} to spread the model over several. Default: the
                CPU.
            subfolder: the model's folder inside.
            weights: pack the weights for inference on a CPU, as `mllama.optimize` does, one by one
                as they are read; or "file", in the file's own types, such as GGUF's blocks.
            kwargs: config fields that override the config's values, such as
                `vision_feature_layer=-1` or `text_config={"use_cache": False}`;
                `attn_implementation`, only "eager"; `reference` of a model with cross-attention;
                the hub's options (`revision`, `cache_dir`, `token`, `local_files_only`,
                `force_download`); transformers' other hub options are accepted, without effect.

        Raises:
            FileNotFoundError: the folder, config or weights do not exist.
            ValueError: the `model_type` is unknown, a file is broken, or weights do not fit (one
                error lists every missing or unexpected tensor and wrong shape); `subfolder` is
                outside the folder.
            TypeError: an option is neither known nor a field of the config, or config has the
                wrong type.
            ImportError: several devices need accelerate, which is not installed.
        """
        from mllama.checkpoints.hub import find_folder
        from mllama.hf.checkpoints import load_model

        asked = {"config": config, "dtype": dtype, "device_map": device_map} | kwargs
        older = kwargs.pop("torch_dtype", None)
        dtype = next((given for given in (dtype, older) if given is not None), "auto")
        own = {name: kwargs.pop(name) for name in cls.load_options & kwargs.keys()}
        own["weights"] = weights
        check_choice(
            "from_pretrained",
            "attn_implementation",
            kwargs.pop("attn_implementation", None),
            (None, "eager"),
        )
        fields = {
            name: value for name, value in kwargs.items() if name not in HUB_OPTIONS | _PASSED_OVER
        }
        options = {
            name: value
            for name, value in kwargs.items()
            if name in HUB_OPTIONS and value is not None
        }
        folder = find_folder(pretrained_model_name_or_path, subfolder, **options)
        if adapters := saved_adapters(folder):
            asked.pop("revision", None)  # it is the adapters'
            model = cls.from_pretrained(adapted_model(next(iter(adapters.values()))), **asked)
            load_adapters(model, adapters)
            return model if weights is None else optimize(merge_and_unload(model), weights)
        where = "cpu" if device_map is None else device_map
        loaded: Any = load_model(cls, folder, config, dtype, where, fields, **own)
        return loaded

    load_options: frozenset[str] = (
        frozenset()
    )  # constructor arguments that from_pretrained passes on

    def save_pretrained(  # type: ignore[override]  # rejected options are in kwargs
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        **kwargs: Any,
    ) -> None:
        """Write the model to a folder, atomically, in its family's own format. The signature is
        transformers'.

        A model with LoRA layers is written as its adapters, in PEFT's format, with other trained
        modules: `from_pretrained` of the folder loads the base model and adds them, and
        transformers' Trainer resumes from it. After `mllama.merge_and_unload` the whole model is
        written. A packed model is written packed (docs/packed-weights.md): stock transformers does
        not read that.

        A `siglip_llama` that Hugging Face's LLaVA can represent (`vision_feature="pre_norm"`,
        `fusion="merge"`, a projector of two layers, projection_dim equal to the decoder's width,
        and an `image_token_index` within the vocabulary) is written as LLaVA. For a model with a
        PEFT adapter the adapter is written, as in transformers.

        Args:
            save_directory: created if needed; other files in it stay.
            is_main_process: False writes nothing.
            state_dict: replaces the model's own; it must be complete.
            push_to_hub: upload the folder afterwards, to `repo_id` (default: the folder's name).
            max_shard_size: maximum size of a weight file in bytes, or a text such as "5GB"; larger
                weights are split into shards with an index.
            kwargs: the other options of transformers' method and of its `push_to_hub`.

        Raises:
            ValueError: `state_dict` is not the complete model; the model is inside a PeftModel;
                adapters would overwrite a whole model; `variant`, `distributed_checkpoint` or
                `safe_serialization=False` is given, which would change the files and is not
                supported.
            TypeError: an option is unknown.
        """
        from mllama.hf.checkpoints import save_model
        from mllama.hf.packed import save_packed_model

        if unknown := sorted(
            kwargs.keys() - _PUSH_OPTIONS - _SAVE_PASSED_OVER - _SAVE_FIXED.keys()
        ):
            raise TypeError(f"save_pretrained got unknown options: {', '.join(unknown)}")
        for name, value in _SAVE_FIXED.items():
            if kwargs.get(name, value) != value:
                raise ValueError(
                    f"{name} must be {value}: weights are written whole, as safetensors, under one "
                    f"name; got {kwargs[name]!r}"
                )
        if (
            self._hf_peft_config_loaded
        ):  # by `add_adapter` or `load_adapter`: the adapter alone, in PEFT's format
            own: dict[str, Any] = {
                "state_dict": state_dict,
                "push_to_hub": push_to_hub,
                "max_shard_size": max_shard_size,
            }
            return super().save_pretrained(save_directory, is_main_process, **own, **kwargs)
        if hasattr(self, "peft_config"):
            raise ValueError(
                "a PeftModel added adapters to this model: save that, or the model after its "
                "merge_and_unload()"
            )
        check_built(self)
        lora = bool(lora_layers(self))
        together = state_dict is None and is_sharded(self)
        if together:
            state_dict = self._sharded_state(lora)
        if state_dict is not None:
            state_dict = {plain_key(name): whole(tensor) for name, tensor in state_dict.items()}
        try:
            if is_main_process and may_write(self):
                if lora:
                    save_adapter_folders(self, Path(save_directory), state_dict, strict=False)
                else:
                    save = save_model if packing_of(self) is None else save_packed_model
                    save(self, save_directory, state_dict, max_shard_size)
                if self.processor is not None:
                    self.processor.save_pretrained(save_directory)
                if push_to_hub:
                    push = {name: value for name, value in kwargs.items() if name in _PUSH_OPTIONS}
                    self.push_to_hub(
                        **{"repo_id": os.path.basename(os.path.abspath(save_directory))} | push
                    )
        finally:
            if together:  # files written by one process are visible to all
                distributed.barrier()

    def _sharded_state(self, lora: bool) -> dict[str, torch.Tensor]:
        """The state dict; for a model with LoRA layers without the frozen weights, which are not
        written.
        """
        state = self.state_dict()
        if not lora:
            return state
        learning = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {
            name: tensor for name, tensor in state.items() if ".lora_" in name or name in learning
        }

    processor: Any = None  # a fused model's processor, saved with it

    @property
    def _checkpoint_conversion_mapping(self) -> dict[str, str]:
        """Read by PEFT to load adapters of transformers' class into this one."""
        return stock_patterns(stock_prefixes(self.config.to_dict()))

    def stock_name(self, name: str) -> str:
        """The dotted name of a parameter or module in transformers' own class of the model;
        unchanged if there is none.
        """
        return stock_name(stock_prefixes(self.config.to_dict()), name)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', for a folder whose adapters have this model's names or those of
        transformers' class.

        Raises:
            ValueError: the adapters' config names layers that their file does not have, which would
                stay random; else as transformers'.
        """
        from transformers.core_model_loading import WeightRenaming

        if "load_config" not in kwargs:
            kwargs.setdefault(
                "weight_mapping",
                [WeightRenaming(*pair) for pair in self._checkpoint_conversion_mapping.items()],
            )
        report = super().load_adapter(*args, **kwargs)
        if report.missing_keys:
            raise ValueError(
                "the adapters do not fit: not in their file: "
                f"{listing(sorted(report.missing_keys))}"
            )
        return report

    def own_names(self, names: Iterable[str]) -> dict[str, str]:
        """Map names of files, or of transformers' classes, to the model's; unknown ones are left
        out.
        """
        from mllama.hf.checkpoints import own_names

        return own_names(self.config, names)

    def tie_weights(self, missing_keys: Any = None, recompute_mapping: bool = True) -> None:
        """As transformers'; a packed head shares the packed embeddings."""
        if packing_of(self) is None:
            super().tie_weights(missing_keys, recompute_mapping)
        else:
            tie_packed(self)

    def init_weights(self) -> None:
        """As transformers'.

        Raises:
            ValueError: the model is packed.
        """
        if packing_of(self) is not None:
            raise ValueError("the weights of a packed model cannot be initialized")
        super().init_weights()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's. Also accepts the names in weight files, whole or shard by shard with
        `strict=False`; names with the parts that torch.compile, DDP and FSDP add; and adapters
        alone with PEFT's names, for which the other tensors do not count as missing. Tensors
        sharded over processes, here or there, are gathered and scattered.

        Raises:
            ValueError: adapters are given for a model without LoRA layers; else as torch's.
        """
        from mllama.hf.checkpoints import translate_state_dict

        adapters_alone = False
        if isinstance(state_dict, Mapping):  # torch reports other types
            adapters_alone = bool(state_dict) and is_peft(state_dict)
            plain = {plain_key(name): tensor for name, tensor in state_dict.items()}
            if adapters_alone and not lora_layers(self):
                raise ValueError(
                    "state_dict holds adapters, and this model has no LoRA layers: "
                    "mllama.load_lora(model, path) converts it"
                )
            state_dict = own_adapters(self, state_dict) if adapters_alone else plain
            state_dict = translate_state_dict(self, state_dict)
            own = {plain_key(name): name for name in self.state_dict()}
            state_dict = given_out(
                self, {own.get(name, name): tensor for name, tensor in state_dict.items()}
            )
        report = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if adapters_alone:
            report.missing_keys[:] = [name for name in report.missing_keys if ".lora_" in name]
        if assign:  # every name got a parameter of its own
            self.tie_weights(recompute_mapping=False)
        return report

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        """Called by transformers' methods to turn activation checkpointing on or off."""
        if (
            getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False
        ):  # torch's default
            gradient_checkpointing_func = functools.partial(_reentrant, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        every = kwargs.get("every_n_layers", 1)  # transformers counts layers of its own class
        layers = (module for module in self.modules() if isinstance(module, CheckpointedLayer))
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = enable and index % every == 0


def _reentrant(
    checkpoint: Callable, forward: functools.partial, hidden_states: torch.Tensor, *args
):
    """Make the first layer's input require a gradient. The reentrant variant silently gives a
    layer's parameters no gradient unless its input requires one, which the input of the first
    layer with an adapter does not if everything below is frozen. transformers does this for
    embedded tokens, not for images.
    """
    layer = forward.args[0]
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters()):
        hidden_states = (
            hidden_states
            if hidden_states.requires_grad
            else hidden_states.detach().requires_grad_()
        )
    return checkpoint(forward, hidden_states, *args)


# transformers' options: where to find a model on the hub; and those without effect here.
HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "revision", "token"}
_PASSED_OVER = {
    "_from_auto",
    "adapter_kwargs",
    "code_revision",
    "low_cpu_mem_usage",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
}
_PUSH_OPTIONS = {
    "commit_description",
    "commit_message",
    "create_pr",
    "private",
    "repo_id",
    "revision",
    "tags",
    "token",
}
# Passed by transformers, Trainer, PEFT and accelerate; the files are the same either way.
_SAVE_PASSED_OVER = {"save_function", "save_original_format", "save_peft_format"}
# Options that would change the files and are not supported: the only accepted value.
_SAVE_FIXED = {"variant": None, "safe_serialization": True, "distributed_checkpoint": False}
