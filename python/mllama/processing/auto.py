"""Loads the preprocessor or tokenizer of any model folder, without transformers."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mllama.families import FAMILIES, MODEL_TYPES
from mllama.processing.folders import read_object, read_settings
from mllama.processing.preprocessors import (
    MergedPreprocessor,
    PaliGemmaPreprocessor,
    Preprocessor,
    TiledPreprocessor,
)
from mllama.processing.prompt import IMAGE_TOKEN, MAX_IMAGE_TOKENS
from mllama.processing.square import SquareImages, read_images
from mllama.processing.text_tokenizer import TextTokenizer, load_tokenizer
from mllama.processing.tiled import read_tiles

KIND_OF_CLASS = {
    family.stock_processor: family.processor
    for family in FAMILIES.values()
    if family.stock_processor
}
KIND_OF_MODEL = {name: family.processor for name, family in MODEL_TYPES.items() if family.processor}
KIND_OF_IMAGES = {"MllamaImageProcessor": "tiled", "SiglipImageProcessor": "images"}


def processor_of(folder: Path, load: Callable[[Path], Any]) -> Any:
    """Call `load` on a model's folder; add the folder to its error."""
    try:
        return load(folder)
    except ValueError as error:  # broken JSON does not say where
        raise ValueError(
            f"{folder} holds a model, but its processor cannot be read: {error}"
        ) from error


def load_preprocessor(path: str | os.PathLike) -> Preprocessor | SquareImages | TextTokenizer:
    """Load a model's preprocessor, without transformers.

    The choice is by exact names: processor_class, then config.json's model_type, then
    image_processor_type. A folder without an image processor has a tokenizer. Meta's own folders
    (params.json) and GGUF files have loaders of their own.

    Args:
        path: a model folder, or a .gguf file.

    Returns:
        The preprocessor, the image transform of a SigLIP, or a text model's tokenizer.

    Raises:
        TypeError: path is not a path.
        FileNotFoundError: the folder or one of its files does not exist.
        ValueError: a file cannot be read, a tokenizer has no tokenizer.json, or the processor
            belongs to an unsupported family, which the message names.
    """
    return load_any(path, _load_folder, _load_gguf, _load_meta)


def load_any(path: str | os.PathLike, folder: Callable, gguf: Callable, meta: Callable) -> Any:
    """Call the reader for a path: `folder` for config.json, `gguf` for a GGUF file, `meta` for
    Meta's own folder.

    Raises:
        TypeError: path is not a path.
        FileNotFoundError: the folder or one of its files does not exist.
        ValueError: a file cannot be read.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__}")
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"no such model: {place}")
    if place.is_file() or not (place / "config.json").exists():
        if (place / "params.json").exists():
            return meta(place)
        files = [place] if place.is_file() else list(place.glob("*.gguf"))
        if len(files) == 1 and files[0].suffix == ".gguf":
            return gguf(files[0])
    try:
        return folder(place)
    except (ValueError, FileNotFoundError):
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"{place} lacks a processor's or tokenizer's files: {error}"
        ) from error
    except Exception as error:  # a broken tokenizer.json raises bare Exception
        raise ValueError(f"{place}: the processor cannot be read: {error}") from error


def _load_gguf(file: Path) -> TextTokenizer:
    from mllama.checkpoints.gguf.tokenizer import read_tokenizer

    return TextTokenizer(*read_tokenizer(file))


def _load_meta(folder: Path) -> Preprocessor | TextTokenizer:
    from mllama.processing.meta import load_meta_preprocessor

    return load_meta_preprocessor(folder)


def _load_folder(folder: Path) -> Preprocessor | SquareImages | TextTokenizer:
    kind = processor_kind(folder)
    if kind is None:
        return load_tokenizer(folder)
    return _READERS[kind](folder, *read_settings(folder))


def _load_images(folder: Path, settings: dict, images: dict) -> SquareImages:
    return read_images(images, image_kind(folder, images, ["SiglipImageProcessor"]))


def _load_tiled(folder: Path, settings: dict, images: dict) -> TiledPreprocessor:
    tokenizer = load_tokenizer(folder)
    image_kind(folder, images, ["MllamaImageProcessor"])
    template = settings.get("chat_template") or tokenizer.chat_template
    return TiledPreprocessor(tokenizer, read_tiles(images), template)


def _load_paligemma(folder: Path, settings: dict, images: dict) -> PaliGemmaPreprocessor:
    tokenizer = load_tokenizer(folder)
    square = _load_images(folder, settings, images)
    template = settings.get("chat_template") or tokenizer.chat_template
    return PaliGemmaPreprocessor(tokenizer, square, images.get("image_seq_length"), template)


def _load_merged(folder: Path, settings: dict, images: dict) -> MergedPreprocessor:
    check_llava(folder, settings, images)
    kind = image_kind(folder, images, ["SiglipImageProcessor", "CLIPImageProcessor"])
    square = read_images(images, kind)
    llava = read_llava(folder, settings, square.result)
    tokenizer = load_tokenizer(folder)
    return MergedPreprocessor(
        tokenizer,
        square,
        settings.get("image_token", IMAGE_TOKEN),
        image_tokens(square.result[0], **llava),
        settings.get("chat_template") or tokenizer.chat_template or None,
    )


_READERS: dict[str, Callable[[Path, dict, dict], Preprocessor | SquareImages]] = {
    "merged": _load_merged,
    "tiled": _load_tiled,
    "paligemma": _load_paligemma,
    "images": _load_images,
}


def processor_kind(folder: Path) -> str | None:
    """The kind of a folder's processor, as in `KIND_OF_MODEL`; None for a tokenizer alone.

    Raises:
        ValueError: the processor is not supported; the message names it.
    """
    settings: dict = {}
    images: dict = {}
    if any(
        (folder / name).exists() for name in ("processor_config.json", "preprocessor_config.json")
    ):
        settings, images = read_settings(folder)
    name = settings.get("processor_class") or images.get("processor_class")
    if name:
        if str(name) not in KIND_OF_CLASS:
            raise ValueError(f"{folder} holds a {name}; what is read is {', '.join(KIND_OF_CLASS)}")
        return KIND_OF_CLASS[str(name)]
    model_type = read_object(folder, "config.json").get("model_type")
    if isinstance(model_type, str) and model_type in KIND_OF_MODEL:
        return KIND_OF_MODEL[model_type]
    if not images:
        return None
    kind = str(images.get("image_processor_type")).removesuffix("Fast")
    if kind not in KIND_OF_IMAGES:
        raise ValueError(
            f"{folder} holds a {kind} and says of no model whose it is; what is read alone is"
            f" {', '.join(KIND_OF_IMAGES)}"
        )
    return KIND_OF_IMAGES[kind]


def image_kind(where: str | os.PathLike, images: dict, accepted: Sequence[str]) -> str:
    """The class of an image processor's settings, one of `accepted`; the first if they name none.

    Raises:
        ValueError: it is another class; the message names it.
    """
    kind = images.get("image_processor_type")
    name = accepted[0] if kind is None else str(kind).removesuffix("Fast")
    if name not in accepted:
        raise ValueError(f"{where} holds a {kind}; what is read is {' or '.join(accepted)}")
    return name


def check_llava(where: str | os.PathLike, settings: dict, images: dict) -> None:
    """Reject settings of another family's processor.

    Raises:
        ValueError: the processor is not LLaVA's; the message names it.
    """
    family = settings.get("processor_class") or images.get("processor_class")
    if family not in (None, "LlavaProcessor"):
        raise ValueError(f"{where} holds a {family}; what is read is a LlavaProcessor")


def read_llava(
    where: str | os.PathLike, settings: dict, size: tuple[int | None, int | None]
) -> dict[str, Any]:
    """The placeholder settings of a LlavaProcessor: patch_size, vision_feature_select_strategy and
    num_additional_image_tokens.

    Args:
        where: the folder, used in errors.
        settings: content of processor_config.json.
        size: height and width of the images.

    Raises:
        ValueError: images are not square, or a setting is invalid.
    """
    patch, more = settings.get("patch_size"), settings.get("num_additional_image_tokens", 0)
    if not size[0] or size[0] != size[1] or not isinstance(patch, int) or not 1 <= patch <= size[0]:
        raise ValueError(
            f"{where} must have images of a square size and a patch_size within it, got {size} and"
            f" {patch}"
        )
    if not isinstance(more, int) or not 0 <= (size[0] // patch) ** 2 + more <= MAX_IMAGE_TOKENS:
        raise ValueError(
            f"{where}: {size[0]} pixels in patches of {patch}, and {more!r} more, must give at most"
            f" {MAX_IMAGE_TOKENS} tokens"
        )
    return {
        "patch_size": patch,
        "vision_feature_select_strategy": settings.get("vision_feature_select_strategy", "full"),
        "num_additional_image_tokens": more,
    }


def image_tokens(
    size: int,
    patch_size: int,
    vision_feature_select_strategy: str,
    num_additional_image_tokens: int,
) -> int:
    """Placeholders of one image of `size` pixels; the default strategy drops the class token."""
    dropped = vision_feature_select_strategy == "default"
    return (size // patch_size) ** 2 + num_additional_image_tokens - dropped
