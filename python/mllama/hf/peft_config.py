"""Where PEFT says that it has put adapters into a model."""

from typing import Any


class PeftConfigMixin:
    """A model that notices PEFT's adapters: PEFT sets the attribute `peft_config` of the model when
    its layers are in place, and deletes it when they are removed; before 0.19 it leaves it behind.
    """

    @property
    def peft_config(self) -> Any:
        """PEFT's configs by adapter; there is no such attribute without layers of PEFT's."""
        if "_peft_config" in self.__dict__:
            from peft.tuners.tuners_utils import BaseTunerLayer

            modules = self.modules()  # type: ignore[attr-defined]
            if any(isinstance(module, BaseTunerLayer) for module in modules):
                return self.__dict__["_peft_config"]
        raise AttributeError(f"{type(self).__name__} has no attribute 'peft_config'")

    @peft_config.setter
    def peft_config(self, configs: Any) -> None:
        from mllama.hf.peft_layers import adopt

        self.__dict__["_peft_config"] = configs
        adopt(self)  # type: ignore[arg-type]

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("_peft_config", None)
