"""Where images come from: every form gives the same pixels, by every door; what is no image is one
short line.
"""

import base64
import http.server
import io
import os
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import mllama
from mllama.hf.processors.auto import load_processor
from mllama.processing import image_source
from mllama.processing.conversation import encode_messages
from mllama.processing.image import load_image, load_pixels

FORMS = [
    "path",
    "text path",
    "file url",
    "bytes",
    "bytearray",
    "memoryview",
    "buffer",
    "file",
    "spooled",
    "data url",
    "base64",
    "lines",
    "url-safe",
]


@pytest.fixture
def data(noise) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    noise().save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def made(data, tmp_path):
    """made(form): the image in that form."""
    path = tmp_path / "a b.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    spooled = tempfile.SpooledTemporaryFile()  # noqa: SIM115
    spooled.write(data)  # and stands at its end
    forms = {
        "path": lambda: path,
        "text path": lambda: str(path),
        "file url": path.as_uri,
        "bytes": lambda: data,
        "bytearray": lambda: bytearray(data),
        "memoryview": lambda: memoryview(data),
        "buffer": lambda: io.BytesIO(data),
        "file": lambda: path.open("rb"),
        "spooled": lambda: spooled,
        "data url": lambda: f"data:image/png;base64,{text}",
        "base64": lambda: text,
        "lines": lambda: base64.encodebytes(data).decode(),
        "url-safe": lambda: base64.urlsafe_b64encode(data).decode().rstrip("="),
    }
    return lambda form: forms[form]()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_image(made, noise, form):
    assert torch.equal(load_pixels(made(form)), load_pixels(noise()))


@pytest.mark.parametrize(
    "family", ["siglip", "llava, siglip", "llava, clip", "paligemma", "mllama"]
)
def test_every_processor_takes_every_form(family_folder, made, noise, family):
    processor = load_processor(family_folder(family))
    named = {} if family == "siglip" else {"text": getattr(processor, "image_token", "") + "a"}
    expected = processor(images=noise(), return_tensors="pt", **named)
    for form in ("path", "bytes", "memoryview", "file", "data url", "base64"):
        for images in (made(form), [made(form)]):
            batch = processor(images=images, return_tensors="pt", **named)
            assert all(torch.equal(batch[name], expected[name]) for name in expected), form


@pytest.mark.parametrize("family", ["llava, siglip", "llava, clip", "mllama"])
def test_image_parts_of_messages(family_folder, made, noise, family):
    processor = load_processor(family_folder(family))
    parts = [
        {"type": "image", "image": made("bytes")},
        {"type": "image", "image": made("file")},
        {"type": "image", "path": made("text path")},
        {"type": "image", "url": made("file url")},
        {"type": "image", "base64": made("base64")},
        {"type": "image_url", "image_url": {"url": made("data url")}},
    ]
    said = lambda part: [{"role": "user", "content": [part, {"type": "text", "text": "a"}]}]  # noqa: E731
    expected = encode_messages(processor, said({"type": "image", "image": noise()}))
    for part in parts:
        ours = encode_messages(processor, said(part))
        theirs = processor.apply_chat_template(
            said(part),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        for batch in (ours, theirs):
            assert all(torch.equal(batch[name], expected[name]) for name in expected), part["type"]


def test_bytes_first_are_images(model_folder, data):
    processor = mllama.MllamaImageProcessor.from_pretrained(model_folder)
    assert torch.equal(processor(data, "a")["pixel_values"], processor("a", data)["pixel_values"])


def closed(path):
    file = path.open("rb")
    file.close()
    return file


def closed_underneath(path):
    with path.open("rb") as file:
        return Image.open(file)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (closed, ValueError, "closed"),
        (closed_underneath, ValueError, "closed"),
        (lambda path: path.open(encoding="latin-1"), TypeError, "binary"),
        (lambda path: b"", ValueError, "no data"),
        (lambda path: path.read_bytes()[:300], ValueError, "truncated"),
        (lambda path: base64.b64encode(path.read_bytes()[:300]).decode(), ValueError, "truncated"),
        (
            lambda path: base64.b64encode(b"hello" * 4000).decode(),
            FileNotFoundError,
            "no such image",
        ),
        (lambda path: f"data:image/png;base64,{'A@' * 10000}", ValueError, "broken base64"),
        (lambda path: "data:image/png;base64", ValueError, "comma"),
        (lambda path: b"<!DOCTYPE html><html>" + b"x" * 20000, ValueError, "HTML page"),
        (
            lambda path: "<!DOCTYPE html><html>" + "x" * 20000,
            ValueError,
            "neither the path of a file nor base64",
        ),
        (lambda path: "no/such/" * 20 + "image.png", FileNotFoundError, "no such image"),
        (lambda path: "file://elsewhere/a.png", ValueError, "of this machine"),
        (lambda path: f"https://localhost/{'x' * 20000}", ValueError, "allow_urls"),
    ],
)
def test_what_is_no_image_is_one_short_line_with_the_reason(data, tmp_path, make, error, said):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(error, match=said) as raised:
        load_image(make(path))
    assert len(str(raised.value)) < 320 and "\n" not in str(raised.value)


@pytest.fixture
def server(data, monkeypatch):
    """The address of a server on this machine: /image, /page, /short (ends early), /slow (drips its
    headers), /far (leads to a file URL); anything else is not found."""
    monkeypatch.setenv("no_proxy", "*")
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path in ("/far", "/near"):
                self.send_response(302)
                self.send_header(
                    "Location", "file:///etc/hostname" if self.path == "/far" else "/image"
                )
                self.end_headers()
                return
            if self.path == "/slow":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                while not ended.wait(0.05):
                    self.wfile.write(b"x")
                return
            body = {"/image": data, "/short": data, "/page": b"<!DOCTYPE html>"}.get(self.path)
            self.send_response(200 if body else 404)
            if self.path == "/short":
                self.send_header("Content-Length", str(len(data) + 7))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        ended.set()
        served.shutdown()


def test_urls_are_downloaded_by_permission_alone(server, noise, monkeypatch):
    for path in ("/image", "/near"):
        assert torch.equal(
            load_pixels(load_image(server + path, allow_urls=True)), load_pixels(noise())
        )
    for path, said in (
        ("/page", "HTML page"),
        ("/none", "404"),
        ("/far", "file:///etc"),
        ("/short", "7 bytes early"),
    ):
        with pytest.raises(ValueError, match=said):
            load_image(server + path, allow_urls=True)
    with pytest.raises(ValueError, match="allow_urls"):
        load_image(server + "/image")
    monkeypatch.setattr(image_source, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="100 bytes"):
        load_image(server + "/image", allow_urls=True)
    monkeypatch.undo()
    monkeypatch.setattr(image_source, "MAX_SECONDS", -1.0)
    with pytest.raises(ValueError, match="-1 seconds"):
        load_image(server + "/image", allow_urls=True)
    monkeypatch.setattr(image_source, "MAX_SECONDS", 0.3)
    with pytest.raises(ValueError, match="0.3 seconds"):
        load_image(server + "/slow", allow_urls=True)


def test_a_server_that_is_not_there():
    with pytest.raises(ValueError, match="cannot download http://127.0.0.1:9/a.png"):
        load_image("http://127.0.0.1:9/a.png", allow_urls=True)


@pytest.mark.parametrize("family", ["siglip", "llava, siglip", "paligemma", "mllama"])
def test_processors_download_by_permission_alone(family_folder, server, noise, family):
    processor = load_processor(family_folder(family))
    named = {} if family == "siglip" else {"text": getattr(processor, "image_token", "") + "a"}
    expected = processor(images=noise(), return_tensors="pt", **named)["pixel_values"]
    assert torch.equal(
        processor(images=[server + "/image"], return_tensors="pt", allow_urls=True, **named)[
            "pixel_values"
        ],
        expected,
    )
    with pytest.raises(ValueError, match="allow_urls"):
        processor(images=[server + "/image"], return_tensors="pt", **named)
    with pytest.raises(TypeError, match="allow_urls"):
        processor(images=[server + "/image"], return_tensors="pt", allow_urls="yes", **named)


def test_messages_download_by_permission_alone(family_folder, server, noise):
    processor = load_processor(family_folder("mllama"))
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": server + "/image"}},
                {"type": "text", "text": "a"},
            ],
        }
    ]
    expected = processor.image_processor([noise()], return_tensors="pt")["pixel_values"]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    theirs = processor.apply_chat_template(
        messages, processor_kwargs={"allow_urls": True}, **options
    )
    assert torch.equal(theirs["pixel_values"], expected)
    assert torch.equal(
        encode_messages(processor, messages, allow_urls=True)["pixel_values"], expected
    )
    for encode in (
        lambda: processor.apply_chat_template(messages, **options),
        lambda: encode_messages(processor, messages),
    ):
        with pytest.raises(ValueError, match="allow_urls"):
            encode()


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(ValueError, match="password") as refused:
        load_image("http://someone:secret@127.0.0.1:9/a.png", allow_urls=True)
    assert "secret" not in str(refused.value)


def test_a_path_that_may_never_end_is_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, str(pipe), pipe.as_uri(), "/dev/zero"):
        with pytest.raises(ValueError, match=Path(str(path)).name):
            load_image(path)
