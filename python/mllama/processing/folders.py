"""Processors on disk: what a folder says, and writing one without leaving half a file."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Self

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from mllama.processing.chat import with_answers

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
)  # one of them every tokenizer has
# All that processors and tokenizers are read from: what one of them leaves beside another's would
# be taken for its own.
PROCESSOR_FILES = (
    *TOKENIZER_FILES,
    "added_tokens.json",
    "additional_chat_templates",  # a folder
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


def read_settings(where: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
    """Return what a folder (or hub id) says of its processor and of its image processor.

    The first is processor_config.json, with the template of an older chat_template.json, and empty
    where there is neither (tokenizers read chat_template.jinja); the second is its
    "image_processor", or preprocessor_config.json. Files are read here, not by transformers: it
    would load an audio tokenizer from wherever they say.

    Args:
        kwargs: of transformers' loading (revision, subfolder, local_files_only ...).

    Raises:
        FileNotFoundError: there is no image processor's file.
        ValueError: a file that is no JSON object.
    """
    processor = read_object(where, "processor_config.json", **kwargs)
    older = read_object(where, "chat_template.json", **kwargs)
    if "chat_template" in older:
        processor = {"chat_template": older["chat_template"], **processor}
    pictures = processor.get("image_processor") or read_object(
        where, "preprocessor_config.json", **kwargs
    )
    if not pictures:
        raise FileNotFoundError(
            f"{where} holds no preprocessor_config.json, and no image processor in a processor_config.json"
        )
    if not isinstance(pictures, dict):
        raise ValueError(
            f"{where}: image_processor in processor_config.json must be a JSON object, got {type(pictures).__name__}"
        )
    return processor, pictures


def load_tokenizer(where: str | os.PathLike, **kwargs) -> PreTrainedTokenizerBase:
    """Read a folder's (or hub id's) tokenizer; code that comes with it is not run unless kwargs say
    trust_remote_code.

    Raises:
        OSError: there are no such files.
        ValueError: they cannot be read.
    """
    folder = Path(where, kwargs.get("subfolder") or "")
    if folder.is_dir() and not any(
        (folder / name).exists() for name in TOKENIZER_FILES
    ):  # transformers would make one up
        raise FileNotFoundError(
            f"{folder} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}"
        )
    try:
        return with_answers(
            AutoTokenizer.from_pretrained(where, **{"trust_remote_code": False, **kwargs})
        )
    except OSError:
        raise
    except Exception as error:  # a broken tokenizer.json raises nothing more definite
        raise ValueError(f"{where}: the tokenizer cannot be read: {error!r}") from error


def save_aside(
    processor: ProcessorMixin,
    save_directory: str | os.PathLike,
    push_to_hub: bool = False,
    **kwargs,
) -> list[str]:
    """Save a processor of transformers; each file is written aside and renamed. Returns their
    paths.
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
    """Reading and writing of a processor whose files are those of one of transformers' own.

    Attributes:
        stock_class: transformers' processor.
        picture_class: our image processor.
        picture_kind: what files call it.
    """

    stock_class: type[ProcessorMixin]
    picture_class: Any
    picture_kind: str

    @classmethod
    def own_pictures(cls, settings: dict, where: str | os.PathLike) -> Any:
        """Our image processor from what an image processor says of itself.

        Raises:
            ValueError: it is of another kind, which the text names.
        """
        kind = settings.get("image_processor_type")
        if kind not in (None, cls.picture_kind, f"{cls.picture_kind}Fast"):
            raise ValueError(f"{where} holds a {kind}: {cls.__name__} reads a {cls.picture_kind}")
        return cls.picture_class.from_dict(settings)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Self:
        """Read a folder (or hub id) that holds such a processor.

        Args:
            kwargs: of transformers' loading (revision, subfolder, local_files_only ...).

        Raises:
            OSError: there are no such files.
            ValueError: another family's image processor, which the text names, or files that cannot
                be read.
        """
        where = pretrained_model_name_or_path
        settings, pictures = read_settings(where, **kwargs)
        tokenizer = load_tokenizer(where, **kwargs)
        template = settings.get("chat_template") or tokenizer.chat_template
        return cls(cls.own_pictures(pictures, where), tokenizer, chat_template=template)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write what stock AutoProcessor reads; each file aside and renamed. Returns the paths."""
        theirs = self.stock_class(
            self.image_processor, self.tokenizer, chat_template=self.chat_template
        )
        return save_aside(theirs, save_directory, push_to_hub, **kwargs)


def read_object(where: str | os.PathLike, name: str, **kwargs) -> dict:
    """Return the JSON object in a file of a folder (or hub id), empty where there is no such file.

    Raises:
        ValueError: it is no JSON object.
    """
    file = cached_file(where, name, _raise_exceptions_for_missing_entries=False, **kwargs)
    if file is None:
        return {}
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {name} must hold a JSON object, got {type(content).__name__}")
    return content
