"""Reading and atomic writing of transformers processors."""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any, Self

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from mllama.hf.processors.chat import with_answers
from mllama.processing.auto import image_kind
from mllama.processing.folders import TOKENIZER_FILES, parse_object, read_settings


def read_stock_settings(where: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
    """`mllama.processing.folders.read_settings` for a folder or a hub id.

    Files are read here, not by transformers, which would load an audio tokenizer from wherever they
    point.

    Args:
        kwargs: options of transformers' loading (revision, subfolder, local_files_only ...).
    """
    return read_settings(where, functools.partial(_read_object, **kwargs))


def _read_object(where: str | os.PathLike, name: str, **kwargs) -> dict:
    file = cached_file(where, name, _raise_exceptions_for_missing_entries=False, **kwargs)
    return {} if file is None else parse_object(file, f"{where}: {name}")


def load_tokenizer(where: str | os.PathLike, **kwargs) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a folder or hub id. Code that comes with it is not run unless kwargs
    have trust_remote_code.

    Raises:
        OSError: the files do not exist.
        ValueError: they cannot be read.
    """
    folder = Path(where, kwargs.get("subfolder") or "")
    if folder.is_dir() and not any(
        (folder / name).exists() for name in TOKENIZER_FILES
    ):  # transformers would create an empty one
        raise FileNotFoundError(
            f"{folder} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}"
        )
    try:
        return with_answers(
            AutoTokenizer.from_pretrained(where, **{"trust_remote_code": False, **kwargs})
        )
    except OSError:
        raise
    except Exception as error:  # a broken tokenizer.json raises bare Exception
        raise ValueError(f"{where}: the tokenizer cannot be read: {error!r}") from error


def save_aside(
    processor: ProcessorMixin,
    save_directory: str | os.PathLike,
    push_to_hub: bool = False,
    **kwargs,
) -> list[str]:
    """Save a transformers processor; each file is written to a temporary file and renamed. Returns
    the paths.
    """
    if push_to_hub:
        return processor.save_pretrained(save_directory, push_to_hub=True, **kwargs)
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with tempfile.TemporaryDirectory(prefix=".processor-", dir=folder) as aside:
        processor.save_pretrained(aside, **kwargs)
        for file in sorted(path for path in Path(aside).rglob("*") if path.is_file()):
            target = folder / file.relative_to(aside)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
            written.append(str(target))
    return written


class StockFiles:
    """Loading and saving of a processor with the files of one of transformers' own.

    Attributes:
        stock_class: transformers' class.
        image_class: our image processor class.
    """

    stock_class: type[ProcessorMixin]
    image_class: Any

    def as_own(self, image_processor: Any) -> Any:
        """Convert an image processor of transformers to ours; ours is returned unchanged.

        Raises:
            ValueError: it is of another class, which the message names.
        """
        if isinstance(image_processor, self.image_class):
            return image_processor
        return self.own_images(image_processor.to_dict(), "image_processor")

    @classmethod
    def own_images(cls, settings: dict, where: str | os.PathLike) -> Any:
        """Build our image processor from the settings of one.

        Raises:
            ValueError: they are of another class, which the message names.
        """
        image_kind(where, settings, [cls.image_class.kind])
        return cls.image_class.from_dict(settings)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Self:
        """Load the processor of a folder or hub id.

        Args:
            kwargs: options of transformers' loading (revision, subfolder, local_files_only ...).

        Raises:
            OSError: the files do not exist.
            ValueError: the image processor is of another class, which the message names, or files
                cannot be read.
        """
        where = pretrained_model_name_or_path
        settings, images = read_stock_settings(where, **kwargs)
        tokenizer = load_tokenizer(where, **kwargs)
        template = settings.get("chat_template") or tokenizer.chat_template
        return cls(cls.own_images(images, where), tokenizer, chat_template=template)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write the files for stock AutoProcessor, each atomically. Returns the paths."""
        theirs = self.stock_class(
            self.image_processor, self.tokenizer, chat_template=self.chat_template
        )
        return save_aside(theirs, save_directory, push_to_hub, **kwargs)
