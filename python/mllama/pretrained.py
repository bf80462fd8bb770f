"""How the package's models are read and written: transformers' methods, on our checkpoints."""

import copy
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig


def own_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config itself, or a copy where a stock model wrote into it how it computes attention: ours has one way, called "eager"."""
    if config._attn_implementation in (None, "eager"):
        return config
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    return config


class PretrainedMixin:
    """`from_pretrained`, `save_pretrained` and `load_state_dict` of a PreTrainedModel, for every format of `mllama.checkpoints`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | dict | None = None,
        subfolder: str | os.PathLike = "",
        **kwargs,
    ):
        """Load a model, in eval mode.

        Args:
            pretrained_model_name_or_path: a folder with config.json and safetensors weights (LLaVA, PaliGemma, Llama-3.2-Vision, Llama,
                Gemma, SigLIP, or our own format), a folder with Meta's own files, a GGUF file, or the id of a model on the hub.
            config: takes the place of the folder's.
            dtype: "auto" (the default) is the files' own; or float32, bfloat16, float16. `torch_dtype` is its older name.
            device_map: a device; or what accelerate takes to spread a model over several: "auto", "balanced", "balanced_low_0",
                "sequential", or {module: device}. The CPU by default.
            subfolder: the model's place inside the folder.
            kwargs: `reference` of a model with cross-attention; the hub's options (`revision`, `cache_dir`, `token`, `local_files_only`,
                `force_download`); the further ones transformers has for them are taken and change nothing.

        Raises:
            FileNotFoundError: no folder, config or weights there.
            ValueError: an unknown `model_type`, a broken file, or weights that do not fit: every missing and unexpected tensor, and every
                wrong shape, in one error. A `subfolder` outside the folder.
            TypeError: an option that is not known, a config of another kind.
            ImportError: a model to be spread over devices, without accelerate.
        """
        from mllama.checkpoints import load_model
        from mllama.checkpoints.hub import find_folder

        older = kwargs.pop("torch_dtype", None)
        dtype = next((given for given in (dtype, older) if given is not None), "auto")
        own = {name: kwargs.pop(name) for name in cls.load_options & kwargs.keys()}
        if unknown := sorted(kwargs.keys() - HUB_OPTIONS - _PASSED_OVER):
            raise TypeError(f"from_pretrained got options it does not know: {', '.join(unknown)}")
        options = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS and value is not None}
        folder = find_folder(pretrained_model_name_or_path, subfolder, **options)
        return load_model(cls, folder, config, dtype, "cpu" if device_map is None else device_map, **own)

    load_options: frozenset[str] = frozenset()  # arguments of the class's constructor that from_pretrained passes on

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        **kwargs,
    ) -> None:
        """Write the model to a folder, whole or not at all, in its family's own format. Signature as transformers'.

        Of our own composition, a model that Hugging Face's LLaVA can be (`vision_feature="pre_norm"`, `fusion="merge"`, a projector of two
        layers, projection_dim equal to the decoder's width, and an `image_token_index` within the vocabulary) is written as LLaVA. Of a
        model with an adapter of PEFT the adapter is written, as in transformers.

        Args:
            save_directory: made if absent; other files in it stay.
            is_main_process: False writes nothing.
            state_dict: takes the place of the model's own; it must have all of its names.
            push_to_hub: afterwards upload the folder, to `repo_id` (the folder's name by default).
            max_shard_size: bytes of one weight file, or text as "5GB"; more is written as shards and an index.
            kwargs: the further options of transformers' method and of its `push_to_hub`.

        Raises:
            ValueError: a `state_dict` that is not the whole model; a model inside a PeftModel, or with LoRA layers; `variant`,
                `distributed_checkpoint` or `safe_serialization=False`, which would change what is written and are not supported.
            TypeError: an option that is not known.
        """
        from mllama.checkpoints import save_model

        if unknown := sorted(kwargs.keys() - _PUSH_OPTIONS - _SAVE_PASSED_OVER - _SAVE_FIXED.keys()):
            raise TypeError(f"save_pretrained got options it does not know: {', '.join(unknown)}")
        for name, value in _SAVE_FIXED.items():
            if kwargs.get(name, value) != value:
                raise ValueError(f"{name} must be {value}: weights are written whole, as safetensors, under one name; got {kwargs[name]!r}")
        if self._hf_peft_config_loaded:  # by `add_adapter` or `load_adapter`: the adapter alone, in PEFT's format
            own = {"state_dict": state_dict, "push_to_hub": push_to_hub, "max_shard_size": max_shard_size}
            return super().save_pretrained(save_directory, is_main_process, **own, **kwargs)
        if hasattr(self, "peft_config"):
            raise ValueError("a PeftModel has put adapters into this model: save that, or the model after its merge_and_unload()")
        if is_main_process:
            save_model(self, save_directory, state_dict, max_shard_size)
            if self.processor is not None:
                self.processor.save_pretrained(save_directory)
            if push_to_hub:
                push = {name: value for name, value in kwargs.items() if name in _PUSH_OPTIONS}
                self.push_to_hub(**{"repo_id": os.path.basename(os.path.abspath(save_directory))} | push)

    processor: Any = None  # of a fused model: what stands before it, saved with it
    older_files: Sequence = ()  # rows of `mllama.checkpoints.engine` for names that the format's own table does not know

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As torch's; takes the names that weight files use too, whole or shard by shard with `strict=False`."""
        from mllama.checkpoints import translate_state_dict

        if isinstance(state_dict, Mapping):  # torch says what else it is
            state_dict = translate_state_dict(self, state_dict, self.older_files)
        report = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if assign:  # it gave every name a parameter of its own
            self.tie_weights(recompute_mapping=False)
        return report

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs) -> None:
        """What transformers' methods call to have activations checkpointed, or not."""
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False:  # what torch does unless told otherwise
            gradient_checkpointing_func = functools.partial(_reentrant, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


def _reentrant(checkpoint: Callable, forward: functools.partial, hidden_states: torch.Tensor, *args):
    """The reentrant kind gives a layer's parameters no gradient, without a word, unless its input asks for one: the input of the first
    layer with an adapter does not, where all below is frozen. transformers makes embedded tokens ask, not pictures."""
    layer = forward.args[0]
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters()):
        hidden_states = hidden_states if hidden_states.requires_grad else hidden_states.detach().requires_grad_()
    return checkpoint(forward, hidden_states, *args)


# Of transformers: where and how to find a model on the hub; and what changes nothing here.
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
_PUSH_OPTIONS = {"commit_description", "commit_message", "create_pr", "private", "repo_id", "revision", "tags", "token"}
# What transformers, Trainer, PEFT and accelerate pass; the files are the same either way.
_SAVE_PASSED_OVER = {"save_function", "save_original_format", "save_peft_format"}
# What would change the files in ways that are not supported: its only value.
_SAVE_FIXED = {"variant": None, "safe_serialization": True, "distributed_checkpoint": False}
