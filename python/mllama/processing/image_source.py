"""Sources of encoded images: a path, a `file://` URL, bytes, a binary file, a data URL, base64
text, or with permission an http(s) URL.
"""

import base64
import binascii
import http.client
import io
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from PIL import Image

MAX_BYTES = 2**26  # limit of a download: 64 MiB
MAX_SECONDS = 30.0  # limit of a download
_STALLED = 10.0  # seconds without any data
_TOO_SLOW = "it takes more than {:g} seconds"
_LONGEST_NAME = 255  # of a file; a longer text is not a path
_BYTES = (bytes, bytearray, memoryview)
_SHOWN = 80


def is_encoded(source: Any) -> bool:
    """Whether it names or contains an encoded image: text, a path, bytes, a file object."""
    return isinstance(source, (str, os.PathLike, *_BYTES)) or hasattr(source, "read")


def is_url(source: Any) -> bool:
    """Whether it is an http(s) URL."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def names_image(text: str) -> bool:
    """Whether a text is a URL, a data URL or the path of a file."""
    return is_url(text) or text[:8].lower().startswith(("data:", "file://")) or os.path.isfile(text)


def shorten(text: str, most: int = _SHOWN) -> str:
    """One line of at most `most` characters; a shortened text ends with its length."""
    line = "".join(
        letter if letter.isprintable() else "\ufffd"
        for letter in " ".join(text[: 4 * most].split())
    )
    return (
        line
        if len(line) <= most and len(text) <= 4 * most
        else f"{line[:most]} ... ({len(text)} characters)"
    )


def open_source(source: Any, allow_urls: bool = False) -> tuple[str | io.BytesIO, str]:
    """Locate an encoded image.

    Args:
        source: anything `is_encoded` accepts. A seekable file object is read from its start.
        allow_urls: download http(s) URLs, at most MAX_BYTES in MAX_SECONDS.

    Returns:
        A path or the bytes, and a short name for errors.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: a file is opened as text.
        ValueError: a path is a folder, pipe or device, a file is closed or unreadable, there is no
            data, base64 is broken, a URL comes without permission, or a download fails.
    """
    if isinstance(source, str):
        return _open_text(source, allow_urls)
    if isinstance(source, os.PathLike):
        return _open_path(os.fsdecode(source))
    if isinstance(source, _BYTES):
        return _in_memory(bytes(source), f"{memoryview(source).nbytes} bytes")
    return _in_memory(_read_file(source), f"file {shorten(str(getattr(source, 'name', 'object')))}")


def _open_text(text: str, allow_urls: bool) -> tuple[str | io.BytesIO, str]:
    scheme = text[:8].lower()
    if is_url(text):
        if not allow_urls:
            raise ValueError(
                "images are downloaded only with allow_urls=True (--allow-urls), got "
                f"{shorten(text)}"
            )
        return _in_memory(_download(text), shorten(text))
    if scheme.startswith("data:"):
        return _in_memory(_decode_data_url(text), shorten(text, 40))
    if scheme.startswith("file://"):
        return _open_path(_path_of(text))
    if os.path.exists(text):
        return _open_path(text)
    data, fault = _decode_base64(text)
    if data is not None and _begins_an_image(data):
        return _in_memory(data, f"base64 text {shorten(text, 20)}")
    if data is None and len(text) > _LONGEST_NAME:
        raise ValueError(
            f"the text is neither the path of a file nor base64 ({fault}): {shorten(text, 40)}"
        )
    raise FileNotFoundError(f"no such image: {shorten(text, _LONGEST_NAME)}")


def _open_path(path: str) -> tuple[str, str]:
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such image: {shorten(path, _LONGEST_NAME)}")
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, not an image")
    if not os.path.isfile(path):  # reading a pipe or a device may never end
        raise ValueError(f"{path} is a pipe or a device: give its data, such as an opened file")
    return path, path


def _in_memory(data: bytes, name: str) -> tuple[io.BytesIO, str]:
    if not data:
        raise ValueError(f"the image holds no data: {name}")
    return io.BytesIO(data), name


def _read_file(file: Any) -> bytes:
    if getattr(file, "closed", False):
        raise ValueError("the image file is closed: open it again")
    try:
        if not hasattr(file, "seekable") or file.seekable():
            file.seek(0)
    except (AttributeError, OSError):  # a stream: read from its current position
        pass
    try:
        data = file.read()
    except (OSError, ValueError) as error:  # opened for writing, or closed underneath
        raise ValueError(
            f"the image file cannot be read: {error or type(error).__name__}"
        ) from error
    if not isinstance(data, _BYTES):
        raise TypeError(
            "an image file must be opened in binary mode, 'rb': read() returned a "
            f"{type(data).__name__}"
        )
    return bytes(data)


def _path_of(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc.lower() not in ("", "localhost"):
        raise ValueError(f"a file URL must be of this machine, file:///path, got {shorten(url)}")
    return urllib.request.url2pathname(parts.path)


def _decode_data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma:
        raise ValueError(
            "a data URL must be data:image/...;base64,... and this one has no comma: "
            f"{shorten(url, 40)}"
        )
    if not head.lower().rstrip().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(data)
    found, fault = _decode_base64(urllib.parse.unquote(data) if "%" in data else data)
    if found is None:
        raise ValueError(f"the data URL has broken base64 ({fault}): {shorten(url, 40)}")
    return found


def _decode_base64(text: str) -> tuple[bytes | None, str]:
    """(bytes or None, fault). Accepts white space, missing padding and the URL alphabet."""
    try:
        packed = (
            "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=").encode("ascii")
        )
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True), ""
    except UnicodeEncodeError:
        return None, "it is not ASCII"
    except binascii.Error as error:
        return None, str(error)


def _begins_an_image(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)):
            return True
    except Exception:  # Pillow's decoders raise many types
        return False


class _HttpOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, new_url):
        if not is_url(new_url):
            raise ValueError(f"it redirects to {shorten(new_url)}")
        return super().redirect_request(request, file, code, message, headers, new_url)


def _download(url: str) -> bytes:
    """Download with Python's own client; proxies and certificates come from the environment."""
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise ValueError("a URL with a user name or password is not downloaded, nor shown here")
    body: Future[bytes] = Future()

    def work() -> None:
        try:
            body.set_result(_fetch(url))
        except Exception as error:
            body.set_exception(error)

    # In a thread: the client limits each wait for data only, and a server that sends its headers
    # slowly would block the caller for hours.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(MAX_SECONDS)
    try:
        if worker.is_alive():
            raise ValueError(_TOO_SLOW.format(MAX_SECONDS))
        return body.result()
    except urllib.error.HTTPError as error:
        raise ValueError(
            f"cannot download {shorten(url)}: the server answered {error.code} "
            f"{shorten(str(error.reason), 200)}"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error  # the text of URLError wraps it
        raise ValueError(
            f"cannot download {shorten(url)}: {shorten(str(reason), 200) or type(reason).__name__}"
        ) from error


def _fetch(url: str) -> bytes:
    request = urllib.request.Request(
        urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "mllama"}
    )
    with urllib.request.build_opener(_HttpOnly).open(request, timeout=_STALLED) as response:
        data = _read_within(response.read1, time.monotonic() + MAX_SECONDS)
        if response.length:  # bytes missing from Content-Length, which read1 does not report
            raise ValueError(f"it ended {response.length} bytes early")
        return data


def _read_within(read: Callable[[int], bytes], deadline: float) -> bytes:
    data = bytearray()
    while chunk := read(2**16):
        data += chunk
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            raise ValueError(_TOO_SLOW.format(MAX_SECONDS))
    return bytes(data)
