"""Images that rows of training data name: paths inside one folder, data URLs, bytes."""

import os
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from mllama.processing.image_source import is_url, open_source, shorten

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


class ImageFinder:
    """Resolves what a row names an image by. Nothing is read but data URLs.

    Args:
        folder: paths are relative to it, and may not leave it: neither by `..` nor as absolute
            paths, unless these lie inside. None: paths are rejected. Links in the folder are
            followed.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self._folder = None if folder is None else os.path.abspath(os.fsdecode(folder))

    def find(self, image: Any, encoded: bool = False) -> str | bytes | Image.Image:
        """An image as an absolute path, bytes, or a PIL image.

        Args:
            image: a path, a data URL, bytes, a PIL image, or {"bytes": ..., "path": ...} as the
                datasets library stores it.
            encoded: a text is base64.

        Raises:
            ValueError: it is something else, a URL, or a path outside the folder.
        """
        if isinstance(image, Mapping) and image.keys() <= {"bytes", "path"}:
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        if isinstance(image, (bytes, Image.Image)):
            return image
        if not isinstance(image, str) or not image:
            kind = "nothing" if image is None or image == "" else type(image).__name__
            raise ValueError(f"an image must be a path or a data URL, got {kind}")
        if encoded or image[:5].lower() == "data:":
            return open_source(f"data:;base64,{image}" if encoded else image)[0].getvalue()  # type: ignore[union-attr]
        if is_url(image):
            raise ValueError(
                f"images are not downloaded, got {shorten(image)}: save it, and name its file"
            )
        if _SCHEME.match(image):
            raise ValueError(f"an image must be a path or a data URL, got {shorten(image)}")
        return self._path(image)

    def _path(self, name: str) -> str:
        if self._folder is None:
            raise ValueError(f"image_folder is needed to find {shorten(name)}")
        if "\0" in name:
            raise ValueError(f"the path of an image holds a NUL character: {shorten(name)}")
        path = os.path.normpath(os.path.join(self._folder, name))
        if os.path.commonpath([self._folder, path]) != self._folder:
            raise ValueError(
                f"the image {shorten(name)} is outside of {self._folder}: set image_folder to a "
                "folder that holds all images"
            )
        return path
