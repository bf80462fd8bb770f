"""Entries of images by content: limits in memory and on disk, and files that are not to be used."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import mllama
import tiny
from helpers import counted_images, needs_kernels
from mllama.runtime.fingerprint import fingerprint
from mllama.runtime.image_cache import _FORMAT, ImageCache
from mllama.runtime.images import ImageReader
from mllama.runtime.session import Session
from runtime.test_images import logits, model_of, prompts, same_bits

EXAMPLE = Path(__file__).parents[2] / "examples" / "pictures" / "drawn.png"
KEYS = [bytes([number]) * 32 for number in range(6)]
KILO = torch.zeros(256)  # a kibibyte


def entry(value: float = 0.0) -> tuple[torch.Tensor, ...]:
    return (KILO + value,)


def fail():
    raise AssertionError("it is computed")


def cached(cache: ImageCache) -> list[int]:
    """Numbers of the keys that are there; looks at all of them."""
    found = []
    for number, key in enumerate(KEYS):
        try:
            assert cache.find(key, fail)[0][0] == number
            found.append(number)
        except AssertionError:
            pass
    return found


@pytest.fixture
def model():
    return tiny.model()


@pytest.fixture
def make(model):
    def made(*arguments, **options) -> ImageCache:
        cache = ImageCache(*arguments, **options)
        cache.attach(model)
        return cache

    return made


def test_the_least_recently_used_is_dropped(make):
    cache = make(3 * 1024 + 5)
    for number in (0, 1, 2):
        cache.find(KEYS[number], lambda number=number: entry(number))
    cache.find(KEYS[0], fail)
    cache.find(KEYS[3], lambda: entry(3))
    assert cached(cache) == [0, 2, 3] and (len(cache), cache.nbytes) == (3, 3072)
    cache.find(KEYS[4], lambda: (torch.zeros(2**20),))  # too large: it drops nothing
    assert cached(cache) == [0, 2, 3]
    cache.find(KEYS[5], lambda: (KILO + 5, KILO))
    assert cached(cache) == [3, 5] and cache.nbytes == 3072
    cache.clear()
    assert cached(cache) == [] and cache.nbytes == 0


def test_nothing_is_kept_with_a_limit_of_zero(make):
    cache = make(0)
    assert torch.equal(cache.find(KEYS[0], lambda: entry(7))[0], KILO + 7)
    assert (len(cache), cache.nbytes) == (0, 0)


@pytest.mark.parametrize("case", ["merge", "added layers"])
def test_a_thousand_images_stay_within_the_limit(case):
    model, cache, most = model_of(case), ImageCache(20_000), 0
    reader, ids = ImageReader(model, cache), torch.tensor([[1]])
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for _ in range(1000):
            pixels = torch.randn(1, 3, 16, 16, generator=generator)
            images, _ = reader.split({"input_ids": ids, "pixel_values": pixels})
            if case == "merge":
                reader.features(images)
            else:
                reader.keys([images], None)
            most = max(most, cache.nbytes)
    assert 10_000 < most <= 20_000
    assert cache.nbytes == sum(one.nbytes for entry in cache._entries.values() for one in entry)


def test_sessions_share_a_cache_in_several_threads():
    model = model_of("merge")
    inputs = [prompts("merge", model, (tiny.tokens(9, seed), 1)) for seed in range(6)]
    cache, results = ImageCache(), {}
    expected = [Session(model).generate(one, max_new_tokens=4).completions for one in inputs]

    def answer(index: int) -> None:
        session = Session(model, image_cache=cache)
        results[index] = [session.generate(one, max_new_tokens=4).completions for one in inputs]

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[index] == expected for index in range(4)) and len(cache) == 1


def test_a_cache_is_of_one_model_and_another_may_have_it_once_that_is_gone(make):
    cache = make()
    cache.find(KEYS[0], lambda: entry(0))
    first, other = tiny.model(), tiny.model()
    with pytest.raises(ValueError, match="image_cache"):
        cache.attach(other)
    cache = ImageCache()
    cache.attach(first)
    cache.find(KEYS[0], lambda: entry(0))
    del first
    gc.collect()
    cache.attach(other)
    assert len(cache) == 0


CASES = ["merge", "mllama", "added layers"]


@pytest.mark.parametrize("case", CASES)
def test_files_give_the_bits_of_a_computed_image(case, tmp_path):
    model = model_of(case)
    inputs = prompts(case, model, (tiny.tokens(9), 2))
    expected = logits(Session(model), inputs)
    for count in (2, 0, 0):
        session = Session(model_like(model, case), image_cache=ImageCache(folder=tmp_path))
        with counted_images(session.model) as images:
            assert same_bits(logits(session, inputs), expected)
            assert images.call_count == count
    assert len(list(tmp_path.iterdir())) == 2


def model_like(model, case: str):
    """Another object with the same weights."""
    made = model_of(case)
    made.load_state_dict(model.state_dict())
    return made


def test_another_process_finds_them(tmp_path):
    code = f"""
from unittest import mock
from mllama.api import open_session
from mllama.runtime.image_cache import ImageCache
from mllama.runtime.questions import encode

session = open_session(device="cpu", image_cache=ImageCache(folder={str(tmp_path)!r}))
inputs = encode(session.processor, {str(EXAMPLE)!r}, "How many objects are there?")
encode_images = session.model.encode_images
with mock.patch.object(session.model, "encode_images", side_effect=encode_images) as images:
    print(images.call_count, session.generate(inputs).completions[0].token_ids, images.call_count)
"""
    outputs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    first, second = (one.stdout.strip() for one in outputs)
    assert first.startswith("0 [") and first.endswith("] 1")
    assert second == first[:-1] + "0"


@needs_kernels
def test_other_instruction_sets_have_other_files(tmp_path):
    """They round otherwise, and a hit has the bits of a miss."""
    code = f"""
from mllama.api import open_session
from mllama.runtime.image_cache import ImageCache
from mllama.runtime.questions import encode

session = open_session(device="cpu", image_cache=ImageCache(folder={str(tmp_path)!r}))
inputs = encode(session.processor, {str(EXAMPLE)!r}, "How many objects are there?")
print(session.generate(inputs, max_new_tokens=1).timings.image.count)
"""
    command = [sys.executable, "-c", code]
    counts = [
        subprocess.check_output(command, env=os.environ | {"MLLAMA_CPU_ISA": isa}, text=True)
        for isa in ("", "", "scalar")
    ]
    assert [int(count) for count in counts] == [1, 0, 1]


def scale(model) -> None:
    model.vision_tower.encoder.layers[1].mlp.fc1.weight.data[3, 5] *= 1.5


def swap(model) -> None:
    rows = model.vision_tower.encoder.layers[0].self_attn.q_proj.weight.data
    rows[[0, 1]] = rows[[1, 0]]


def adapt(model) -> None:
    mllama.convert_linears_to_lora(model.multi_modal_projector, rank=2)


def to_half(model) -> None:
    model.bfloat16()


def widen(model) -> None:
    model.vision_tower.post_layernorm.eps = 1e-3


@pytest.mark.parametrize("change", [scale, swap, adapt, to_half, widen])
def test_other_weights_have_other_files(change, tmp_path):
    model = model_of("merge")
    inputs = prompts("merge", model, (tiny.tokens(9), 1))
    logits(Session(model, image_cache=ImageCache(folder=tmp_path)), inputs)
    before = fingerprint(model.image_modules())
    change(model)
    assert fingerprint(model.image_modules()) != before
    session = Session(model, image_cache=ImageCache(folder=tmp_path))
    with counted_images(model) as images:
        found = logits(session, inputs)
        assert images.call_count == 1
    assert same_bits(found, logits(Session(model), inputs))


def test_a_session_with_files_notices_adapters_and_a_reset(tmp_path):
    model = model_of("merge")
    inputs = prompts("merge", model, (tiny.tokens(9), 1))
    session = Session(model, image_cache=ImageCache(folder=tmp_path))
    plain = logits(session, inputs)
    mllama.convert_linears_to_lora(model.vision_tower, rank=2)
    for name, parameter in model.vision_tower.named_parameters():
        if "lora" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    adapted = logits(Session(model), inputs)
    assert same_bits(logits(session, inputs), adapted) and not same_bits(adapted, plain)
    with counted_images(model) as images:
        with mllama.lora_disabled(model):
            assert same_bits(logits(session, inputs), plain)
        assert same_bits(logits(session, inputs), adapted)
        assert images.call_count <= 1  # with adapters from its file
    scale(model)
    session.reset()
    assert same_bits(logits(session, inputs), logits(Session(model), inputs))


def test_files_are_of_the_plain_encoder(tmp_path):
    """Hooks and other forwards compute something else of the same weights."""
    model = model_of("merge")
    inputs = prompts("merge", model, (tiny.tokens(9), 1))
    layer = model.vision_tower.encoder.layers[0].mlp
    compute = layer.forward

    def stored() -> list[torch.Tensor]:
        found = logits(Session(model, image_cache=ImageCache(folder=tmp_path)), inputs)
        assert same_bits(found, logits(Session(model), inputs))
        return found

    hooked = []
    for factor in (2, 5):
        hook = layer.register_forward_hook(lambda *call, factor=factor: call[-1] * factor)
        hooked.append(stored())
        hook.remove()
    assert not same_bits(*hooked) and not list(tmp_path.iterdir())
    plain = stored()
    assert len(list(tmp_path.iterdir())) == 1
    layer.forward = lambda x: compute(x) * 3
    assert not same_bits(stored(), plain)


def test_files_are_named_after_the_weights_while_another_session_begins(
    make, model, tmp_path, monkeypatch
):
    make(folder=tmp_path).find(KEYS[0], entry)
    cache = make(folder=tmp_path)

    class Version(int):
        def __format__(self, spec):  # while a file's name is made
            cache.attach(model)
            return super().__format__(spec)

    monkeypatch.setattr("mllama.runtime.image_cache._FORMAT", Version(_FORMAT))
    cache.find(KEYS[0], fail)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("folder", [False, True])
def test_what_was_rounded_by_autocast_is_not_used_without(folder, tmp_path):
    model = model_of("merge")
    inputs = prompts("merge", model, (tiny.tokens(9), 1))
    cache = ImageCache(0, tmp_path) if folder else ImageCache()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits(Session(model, image_cache=cache), inputs)
    plain = logits(Session(model, image_cache=cache), inputs)
    assert same_bits(plain, logits(Session(model), inputs)) and not same_bits(plain, rounded)


def test_a_forgotten_reset_spoils_no_file(tmp_path):
    model = model_of("merge")
    inputs = prompts("merge", model, (tiny.tokens(9), 1))
    session = Session(model, image_cache=ImageCache(folder=tmp_path))
    logits(session, inputs)
    scale(model)
    other = inputs | {"pixel_values": inputs["pixel_values"] * 2}
    logits(session, other)
    fresh = Session(model, image_cache=ImageCache(folder=tmp_path))
    with counted_images(model) as images:
        found = logits(fresh, other)
        assert images.call_count == 0
    assert same_bits(found, logits(Session(model), other))


def test_the_decoders_other_weights_do_not_matter():
    for case in ("merge", "mllama"):
        model = model_of(case)
        before = fingerprint(model.image_modules())
        model.lm_head.weight.data.mul_(2)
        model.language_model.layers[0].mlp.up_proj.weight.data.mul_(2)
        assert fingerprint(model.image_modules()) == before
    model.language_model.layers[3].cross_attn.v_proj.weight.data[0, 0] += 1
    assert fingerprint(model.image_modules()) != before


def shorten(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def junk(path):
    path.write_bytes(b"\xff" * 400)


def exchange(path):
    path.write_bytes(max(path.parent.iterdir(), key=lambda other: other != path).read_bytes())


def be_a_folder(path):
    path.unlink()
    path.mkdir()


def be_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [shorten, flip, empty, junk, exchange, be_a_folder, be_a_pipe])
def test_a_file_that_is_not_whole_is_not_used(spoil, make, tmp_path):
    for number in (0, 1):
        make(folder=tmp_path).find(KEYS[number], lambda number=number: entry(number))
    spoil(min(tmp_path.iterdir()))
    found = [
        make(folder=tmp_path).find(KEYS[number], lambda number=number: entry(number))[0]
        for number in (0, 1)
    ]
    assert torch.equal(found[0], KILO) and torch.equal(found[1], KILO + 1)
    if spoil is not be_a_folder:  # it is replaced
        assert cached(make(folder=tmp_path)) == [0, 1]


def test_files_stay_within_their_limit_and_others_are_left_alone(make, tmp_path):
    (tmp_path / "notes.txt").write_text("x" * 9000)
    options = {"folder": tmp_path, "max_folder_bytes": 4000}
    sizes = []
    for number in range(5):
        make(0, **options).find(KEYS[number], lambda number=number: entry(number))
        make(0, **options).find(KEYS[0], lambda: entry(0))  # used again and again
        sizes.append(sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")))
    assert max(sizes) <= 4000 and sizes[-1] > 2048
    assert cached(make(0, **options)) == [0, 3, 4]
    make(0, **options).find(KEYS[5], lambda: (torch.zeros(2000),))  # larger than all
    assert cached(make(0, **options)) == [0, 3, 4]
    assert (tmp_path / "notes.txt").stat().st_size == 9000


def test_what_cannot_be_removed_does_not_end_the_limit(make, tmp_path, monkeypatch):
    (tmp_path / f"{'0' * 64}.safetensors").mkdir()
    options, unlink, kept = {"folder": tmp_path, "max_folder_bytes": 4000}, Path.unlink, []

    def refuse(path, *arguments, **named):
        if path in kept:
            raise PermissionError("another user's")
        unlink(path, *arguments, **named)

    monkeypatch.setattr(Path, "unlink", refuse)
    for number in range(6):
        make(0, **options).find(KEYS[number], lambda number=number: entry(number))
        kept = kept or [path for path in tmp_path.iterdir() if path.is_file()]
    sizes = [path.stat().st_size for path in tmp_path.iterdir() if path.is_file()]
    assert len(sizes) == 3 and sum(sizes) <= 4000 and kept[0].exists()


def test_a_file_that_its_header_makes_too_large_drops_no_others(make, tmp_path):
    options = {"folder": tmp_path, "max_folder_bytes": 4000}
    for number, size in ((0, 256), (1, 990)):  # 3,960 bytes of values
        value = torch.full((size,), float(number))
        make(0, **options).find(KEYS[number], lambda value=value: (value,))
    assert cached(make(0, **options)) == [0]


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(make, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("mllama.runtime.image_files.write_file", full)
    cache = make(folder=tmp_path)
    assert torch.equal(cache.find(KEYS[0], lambda: entry(1))[0], KILO + 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"max_bytes": -1}, ValueError, "max_bytes"),
        ({"max_bytes": 2.5}, TypeError, "max_bytes"),
        ({"max_folder_bytes": 0}, ValueError, "max_folder_bytes"),
        ({"folder": 5}, TypeError, "folder"),
        ({"folder": ""}, TypeError, "folder"),
    ],
)
def test_arguments_are_refused_by_name(arguments, error, name):
    with pytest.raises(error, match=name):
        ImageCache(**arguments)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ImageCache(folder=tmp_path / "file")
