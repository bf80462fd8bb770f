"""Images of sessions: encoded once, with the bits of a fresh run, whatever was asked before."""

import contextlib

import pytest
import torch

import mllama
import tiny
from helpers import counted_images, counted_steps, needs_kernels, prefilled
from mllama.runtime.image_cache import ImageCache
from mllama.runtime.session import Session
from tiny import batches, pairs, stock
from tiny.sizes import TILED_IMAGE

LENGTH = 4
CASES = [
    "llava, clip, -2",
    "paligemma",
    "mllama",
    "mllama, hf",
    "merge",
    "before the text",
    "added layers",
]


def model_of(case: str):
    """A tiny model whose images change its logits."""
    if case.startswith("mllama"):
        model = pairs.make("mllama").ours
        model.reference = "hf" if case.endswith("hf") else "meta"
        return model
    if case in stock.MAKERS:
        return pairs.make(case).ours
    if case == "merge":
        return tiny.model()
    if case == "before the text":
        return tiny.prepend(num_image_tokens=3)
    model = tiny.crossed()
    for layer in model.spec.text.cross_attention_layers:
        model.language_model.layers[layer].cross_attn_attn_gate.data.fill_(1)
    return model


def prompts(case: str, model, *rows: tuple[list[int], int]) -> dict:
    """A batch of rows of ids, with how many images behind the first two of them: all rows have the
    same first and second image.
    """
    spec = model.spec
    if case.startswith("mllama"):
        ids = [[*ids[:2], *[TILED_IMAGE] * count, *ids[2:]] for ids, count in rows]
        ratios = [[3, 8][:count] for _, count in rows]
        batch = batches.tiled(model, *zip(ids, ratios, strict=True))
        batch["pixel_values"] = batch["pixel_values"][:1].repeat(len(rows), *[1] * 5)
        return batch
    between = [spec.image_token_index] * spec.tokens_per_image
    if case in ("before the text", "added layers"):
        between = []
    batch = tiny.batch(*([*ids[:2], *between * count, *ids[2:]] for ids, count in rows))
    if any(count for _, count in rows):
        pixels = tiny.images(2, 1, spec.vision.image_size)
        batch["pixel_values"] = torch.cat([pixels[:count] for _, count in rows])
    return batch


def logits(session: Session, inputs: dict) -> list[torch.Tensor]:
    """The last logits of each pass of a few greedy tokens."""
    found, compute = [], session.model.compute

    def recorded(given):
        output = compute(given)
        if output.logits is not None:
            found.append(output.logits[:, -1].clone())
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.model, "compute", recorded)
        session.generate(inputs, max_new_tokens=LENGTH)
    return found


def same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def alone(model, inputs: dict, length: int = LENGTH) -> list[list[int]]:
    """Greedy tokens of each row by itself."""
    answers = []
    for row, keep in enumerate(inputs["attention_mask"] != 0):
        one = {"input_ids": inputs["input_ids"][row : row + 1, keep]}
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            if name in inputs:
                count = len(inputs[name]) // len(inputs["input_ids"])
                one[name] = inputs[name][row * count : (row + 1) * count]
        if "cross_attention_mask" in inputs:
            one["cross_attention_mask"] = inputs["cross_attention_mask"][row : row + 1, keep]
        made = Session(model).generate(one, max_new_tokens=length)
        answers.append(made.completions[0].token_ids)
    return answers


@contextlib.contextmanager
def counted_calls(module: torch.nn.Module, interrupt_at: int = 0):
    """Yields a list with an entry for each call of a module. It can interrupt one of the calls."""
    calls = []

    def count(*_):
        calls.append(1)
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt

    hook = module.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("case", CASES)
def test_a_cached_image_gives_the_bits_of_a_computed_one(case, kv_cache):
    model, cache = model_of(case), ImageCache()
    inputs = [prompts(case, model, (tiny.tokens(9, seed), 1)) for seed in (2, 5, 2)]
    for given in inputs:
        with counted_images(model) as images:
            found = logits(Session(model, kv_cache=kv_cache, image_cache=cache), given)
            assert images.call_count == (given is inputs[0])
        fresh = Session(model, kv_cache=kv_cache, image_cache=ImageCache(0))
        assert same_bits(found, logits(fresh, given))


@pytest.mark.parametrize("case", CASES)
def test_a_second_conversation_about_an_image_computes_text_alone(case):
    model = model_of(case)
    inputs = [prompts(case, model, (tiny.tokens(9, seed), 1)) for seed in (2, 5, 2)]
    expected, session = [alone(model, given) for given in inputs], Session(model)
    layers = model.spec.text.cross_attention_layers
    projections = [model.language_model.layers[layer].cross_attn.k_proj for layer in layers]
    with counted_images(model) as images, contextlib.ExitStack() as stack:
        calls = [stack.enter_context(counted_calls(projection)) for projection in projections]
        for given, answers in zip(inputs, expected, strict=True):
            found = session.generate(given, max_new_tokens=LENGTH)
            assert [row.token_ids for row in found.completions] == answers
        assert images.call_count == 1
        assert [len(one) for one in calls] == [1] * len(layers)  # of the image's keys


@pytest.mark.parametrize("case", CASES)
def test_a_changed_pixel_is_another_image(case):
    model = model_of(case)
    inputs = prompts(case, model, (tiny.tokens(9), 1))
    pixels = inputs["pixel_values"].clone()
    pixels.flatten()[7] = torch.nextafter(pixels.flatten()[7], torch.tensor(9.0))
    changed, session = inputs | {"pixel_values": pixels}, Session(model)
    with counted_images(model) as images:
        for given in (inputs, changed, inputs, changed):
            session.generate(given, max_new_tokens=1)
        assert images.call_count == 2
        pixels.flatten()[7] += 3  # written in place
        found = logits(session, changed)
        assert images.call_count == 3
    tiny.close(found[0], logits(Session(model), changed)[0], 1e-5)


def test_other_tiles_of_the_same_pixels_are_another_image():
    model = model_of("mllama")
    inputs = prompts("mllama", model, (tiny.tokens(9), 1))
    session = Session(model)
    ratio = inputs | {"aspect_ratio_ids": inputs["aspect_ratio_ids"] - 1}
    with counted_images(model) as images:
        for given in (inputs, ratio):
            logits(session, given)
        model.reference = "hf"
        found = logits(session, inputs)
        assert images.call_count == 3
    assert same_bits(found, logits(Session(model), inputs))


@pytest.mark.parametrize("case", ["llava, clip, -2", "merge", "mllama"])
def test_a_further_image_is_encoded_alone_and_the_text_before_it_is_not_read_again(case):
    model = model_of(case)
    one = prompts(case, model, (tiny.tokens(9), 1))
    token = TILED_IMAGE if case.startswith("mllama") else model.spec.image_token_index
    session = Session(model)
    answer = session.generate(one, max_new_tokens=LENGTH).completions[0].token_ids
    known = one["input_ids"][0].tolist() + answer
    places = [token] * (model.spec.tokens_per_image or 1)
    more = [*known, *places, *tiny.tokens(4, 8)]
    two = tiny.batch(more) | {"pixel_values": tiny.images(2, size=model.spec.vision.image_size)}
    if case.startswith("mllama"):
        two = batches.tiled(model, (more, [3, 8]))
        two["pixel_values"][:, :1] = one["pixel_values"]  # padded with as many tiles
    with counted_images(model) as images, prefilled(model) as passes:
        found = session.generate(two, max_new_tokens=LENGTH)
        assert images.call_count == 1
    assert found.num_reused_tokens == len(known) - 1
    assert passes[0] == (1, len(more) - len(known) + 1)
    fresh = Session(model).generate(two, max_new_tokens=LENGTH)
    assert [row.token_ids for row in found.completions] == [
        row.token_ids for row in fresh.completions
    ]


@pytest.mark.parametrize("case", CASES)
def test_an_image_that_comes_twice_is_encoded_once(case):
    model = model_of(case)
    inputs = prompts(case, model, (tiny.tokens(9), 2))
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        if name in inputs:
            images = inputs[name].unbind(1) if case.startswith("mllama") else inputs[name].unbind(0)
            inputs[name] = torch.stack([images[0]] * 2, 1 if case.startswith("mllama") else 0)
    if case.startswith("mllama"):
        mask = inputs["cross_attention_mask"]
        mask[..., :] = (
            mask.flatten(2).any(-1)[..., None, None] * inputs["aspect_ratio_mask"][:, None]
        )
    for cache in (None, ImageCache(0)):
        session = Session(model, image_cache=cache)
        with counted_images(model) as images:
            found = session.generate(inputs, max_new_tokens=LENGTH).completions[0].token_ids
            assert images.call_count == 1
        expected = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
        assert found == expected[0, inputs["input_ids"].shape[1] :].tolist()


TAILS = [tiny.tokens(5, 7), tiny.tokens(2, 8), tiny.tokens(9, 9)]
SHARED = tiny.tokens(18, 3)


@pytest.mark.parametrize("tails", [TAILS, [tiny.tokens(4, seed) for seed in (5, 6, 7)]])
@pytest.mark.parametrize("case", ["llama", *CASES])
def test_questions_of_a_batch_share_their_start_and_their_image(case, tails):
    model = model_of(case)
    count = int(case != "llama")
    inputs = prompts(case, model, *(([*SHARED, *tail], count) for tail in tails))
    expected, session = alone(model, inputs), Session(model)
    start = inputs["input_ids"].shape[1] - max(map(len, tails))
    with counted_images(model) as images, prefilled(model) as passes:
        found = session.generate(inputs, max_new_tokens=LENGTH)
        again = session.generate(inputs, max_new_tokens=LENGTH)
        assert images.call_count == count
    assert [row.token_ids for row in found.completions] == expected
    assert [row.token_ids for row in again.completions] == expected
    if case == "paligemma":  # a prompt that is seen both ways is computed whole
        assert passes[0] == (3, inputs["input_ids"].shape[1])
        return
    longest = max(map(len, tails))
    assert passes[:2] == [(1, start), (3, longest)]
    assert passes[1 + LENGTH] == (3, longest)  # the start is in the cache
    assert (found.num_reused_tokens, again.num_reused_tokens) == (0, start)


def test_a_prompt_after_a_batch_and_a_batch_after_a_prompt_reuse_the_start():
    model = model_of("llava, clip, -2")
    rows = prompts("llava, clip, -2", model, *(([*SHARED, *tail], 1) for tail in TAILS))
    one = prompts("llava, clip, -2", model, ([*SHARED, *tiny.tokens(3, 4)], 1))
    start, session = one["input_ids"].shape[1] - 3, Session(model)
    expected = alone(model, rows), alone(model, one)
    for inputs, answers, reused in (
        (rows, expected[0], 0),
        (one, expected[1], start),
        (rows, expected[0], start),
        (one, expected[1], start),
    ):
        found = session.generate(inputs, max_new_tokens=LENGTH)
        assert [row.token_ids for row in found.completions] == answers
        assert found.num_reused_tokens == reused


@pytest.mark.parametrize("case", CASES)
def test_rows_of_different_images(case):
    """Each row is what it is alone, and the image that two rows share is encoded once."""
    model = model_of(case)
    inputs = prompts(case, model, *(([*SHARED, *tail], 1) for tail in TAILS))
    pixels = inputs["pixel_values"].clone()
    pixels[1] = pixels[1].flip(-1) * 2
    inputs["pixel_values"] = pixels
    with counted_images(model) as images:
        found = Session(model).generate(inputs, max_new_tokens=LENGTH)
        assert images.call_count == 2
    assert [row.token_ids for row in found.completions] == alone(model, inputs)


def test_rows_of_tiled_images_with_other_tiles():
    """A row without the keys that another one has."""
    model = model_of("mllama")
    ids = [[*tiny.tokens(2), TILED_IMAGE, *tail] for tail in TAILS]
    for reference in ("meta", "hf"):
        model.reference = reference
        inputs = batches.tiled(model, *zip(ids, ([1], [8], [4]), strict=True))
        found = Session(model).generate(inputs, max_new_tokens=LENGTH)
        assert [row.token_ids for row in found.completions] == alone(model, inputs)


@pytest.mark.parametrize("case", ["gemma2", "gemma3_text", "gemma2, one wide window"])
def test_windows_do_not_reach_over_padding(case):
    """While padding stands behind the shared start, it must not push keys out of a window."""
    model = pairs.pair(case).ours
    window = min(layer.window for layer in model.spec.text.layers if layer.window)
    alike = [tiny.tokens(6, seed) for seed in (5, 6)]
    for start, tails in ((SHARED, TAILS), (SHARED, alike), (SHARED[:16], [[4], [5, 6, 7, 8]])):
        inputs = tiny.batch(*([*start, *tail] for tail in tails))
        with prefilled(model) as passes:
            found = Session(model).generate(inputs, max_new_tokens=9)
        assert (passes[0][0] == 1) == (tails is alike or inputs["input_ids"].shape[1] <= window)
        assert [row.token_ids for row in found.completions] == alone(model, inputs, 9)


@needs_kernels
def test_a_packed_model_decodes_rows_with_a_shared_start_by_its_operator():
    model = mllama.optimize(pairs.make("llama").ours, "f32")
    inputs = tiny.batch(*([*SHARED, *tail] for tail in TAILS))
    with counted_steps() as steps, prefilled(model) as passes:
        found = Session(model).generate(inputs, max_new_tokens=LENGTH)
    assert passes[0] == (1, len(SHARED)) and steps.call_count == LENGTH - 1
    assert [row.token_ids for row in found.completions] == alone(model, inputs)


def test_rows_that_share_little_are_computed_together():
    model = pairs.pair("llama").ours
    with prefilled(model) as passes:
        Session(model).generate(tiny.batch([1, 2, 3, 4], [1, 2, 3, 5, 6]), max_new_tokens=1)
    assert passes == [(2, 5)]


def test_one_row_is_the_start_of_another_or_the_same():
    model = pairs.pair("llama").ours
    inputs = tiny.batch(SHARED, [*SHARED, 5], SHARED)
    found = Session(model).generate(inputs, max_new_tokens=LENGTH)
    assert [row.token_ids for row in found.completions] == alone(model, inputs)


def test_an_interrupted_batch_leaves_nothing_behind():
    model = pairs.make("llama").ours
    inputs = tiny.batch(*([*SHARED, *tail] for tail in TAILS))
    expected, session = alone(model, inputs), Session(model)
    for number in (1, 2, 3):
        session.reset()
        with counted_calls(model.language_model.layers[1], interrupt_at=number):
            session.generate(inputs, max_new_tokens=LENGTH, interruptible=True)
        found = session.generate(inputs, max_new_tokens=LENGTH)
        assert [row.token_ids for row in found.completions] == expected


def test_adapters_of_the_encoder_and_changed_weights_are_noticed():
    model = model_of("merge")
    inputs = prompts("merge", model, (tiny.tokens(9), 1))
    session, plain = Session(model), logits(Session(model), inputs)
    logits(session, inputs)
    mllama.convert_linears_to_lora(model.vision_tower, rank=2)
    for name, parameter in model.vision_tower.named_parameters():
        if "lora" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    adapted = logits(Session(model), inputs)
    assert not same_bits(adapted, plain)
    assert same_bits(logits(session, inputs), adapted)
    with mllama.lora_disabled(model):
        assert same_bits(logits(session, inputs), plain)
    assert same_bits(logits(session, inputs), adapted)
    model.vision_tower.embeddings.patch_embedding.weight.data.mul_(2)
    session.reset()
    assert same_bits(logits(session, inputs), logits(Session(model), inputs))


def test_arguments_are_refused_by_name():
    model = pairs.pair("llama").ours
    with pytest.raises(TypeError, match="image_cache"):
        Session(model, image_cache=2**20)
    cache = ImageCache()
    with pytest.raises(ValueError, match="image_cache"):
        Session(model, image_cache=cache)
    first, second = tiny.model(), tiny.model()
    Session(first, image_cache=cache)
    with pytest.raises(ValueError, match="image_cache"):
        Session(second, image_cache=cache)


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_adapters_that_are_loaded_over_others_are_noticed(part, tmp_path):
    model = model_of("merge")
    inputs = prompts("merge", model, (tiny.tokens(9), 1))
    mllama.convert_linears_to_lora(getattr(model, part), rank=2)
    session, paths = Session(model), (tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    for seed, path in enumerate(paths):
        tiny.randomize(model, seed)
        model.load_state_dict(model_of("merge").state_dict(), strict=False)
        mllama.save_lora(model, path)
    answers = []
    for path in (*paths, paths[0]):
        mllama.load_lora(model, path)
        answers.append(logits(session, inputs))
        assert same_bits(answers[-1], logits(Session(model), inputs))
    assert same_bits(answers[0], answers[2]) and not same_bits(answers[0], answers[1])


def test_a_model_that_is_packed_is_noticed():
    model = model_of("merge")
    inputs = prompts("merge", model, (tiny.tokens(9), 1))
    session = Session(model)
    logits(session, inputs)
    mllama.optimize(model, "int4")
    assert same_bits(logits(session, inputs), logits(Session(model), inputs))


@pytest.mark.parametrize("case", ["mllama", "added layers", "merge"])
def test_autocast(case):
    """Stored keys of images are read in the dtype that autocast gives to queries."""
    model = model_of(case)
    inputs = prompts(case, model, (tiny.tokens(9), 1))
    session = Session(model)
    plain = logits(session, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        session.reset()
        rounded = logits(session, inputs)
    tiny.close(rounded[0].float(), plain[0], tolerance=0.1)
    assert not same_bits(rounded[:1], plain[:1])
