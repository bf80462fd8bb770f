"""The generator of the embedded model's images: repeatable, rightly labeled, and asking only
what can be answered.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from shapes.backgrounds import DEMO_PHOTOS, HELD_OUT_PHOTOS, KINDS, TRAINING_PHOTOS, background
from shapes.dataset import (
    HELD_OUT_SEED,
    ImageBatches,
    batches,
    curriculum,
    held_out,
    image_rng,
    pixels_of,
)
from shapes.drawing import SHAPES, shape_masks, text_mask
from shapes.evaluation import Case, is_right, named_objects
from shapes.labels import HEADS, IGNORE, OFFSETS, dense_labels
from shapes.palette import COLORS, PALETTE, contrast, shade
from shapes.questions import PHRASINGS, Turn, ask, description
from shapes.scene import POSITIONS, Recipe, make_scene, position_name
from shapes.tokenizer import build_tokenizer

SCENES = 150


@pytest.fixture(scope="module")
def scenes():
    made = []
    for i in range(SCENES):
        rng = image_rng(5, i)
        scene = make_scene(rng)
        made.append((scene, ask(scene, rng, 8, describe=1.0)))
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_one_seed_is_one_image(tokenizer):
    first, again = (ImageBatches(3, 4, 1000).make(7, tokenizer) for _ in range(2))
    other = ImageBatches(4, 4, 1000).make(7, tokenizer)
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.classes, again.classes)
    assert not torch.equal(first.pixels, other.pixels)


def test_a_run_that_starts_later_sees_the_same_batches():
    late = next(batches(3, 2, 1000, start=5, workers=0))
    stream = batches(3, 2, 1000, start=3, workers=0)
    for _ in range(3):
        early = next(stream)
    assert torch.equal(late.pixels, early.pixels) and torch.equal(late.labels, early.labels)


def test_training_never_reaches_the_held_out_numbers():
    assert HELD_OUT_SEED > 10**12
    assert not set(TRAINING_PHOTOS) & set(DEMO_PHOTOS + HELD_OUT_PHOTOS)


def test_scenes_vary(scenes):
    counts = {len(scene.objects) for scene, _ in scenes}
    assert counts >= {0, 1, 2, 3, 4, 5}
    assert {thing.shape for scene, _ in scenes for thing in scene.objects} == set(SHAPES)
    assert {thing.color for scene, _ in scenes for thing in scene.objects} == set(COLORS)
    assert {scene.background for scene, _ in scenes} == set(KINDS)
    assert any(scene.text is not None for scene, _ in scenes)
    assert len({scene.image.size for scene, _ in scenes}) > SCENES // 2


def test_objects_are_drawn_where_and_how_the_scene_says():
    """In the middle of an object that is no ring stands a color nearest to its own name's."""
    right = total = 0
    for i in range(100):
        scene = make_scene(
            image_rng(11, i), Recipe(backgrounds=(1, 0, 0, 0), text_only=0, text_beside=0)
        )
        pixels = np.asarray(scene.image.convert("RGB"))
        for thing in scene.objects:
            if thing.shape in ("ring", "triangle"):
                continue
            here = pixels[int(thing.y * pixels.shape[0]), int(thing.x * pixels.shape[1])]
            near = min(
                PALETTE,
                key=lambda name: min(contrast(here, np.array(value)) for value in PALETTE[name]),
            )
            right, total = right + (near == thing.color), total + 1
    assert total > 100 and right / total > 0.93


def test_dense_labels_point_at_the_objects(scenes):
    place = {name: i for i, name in enumerate(HEADS)}
    for scene, _ in scenes:
        classes, numbers = dense_labels(scene)
        assert classes.shape == (144, len(HEADS)) and numbers.shape[0] == 144
        for name, size in HEADS.items():
            column = classes[:, place[name]]
            assert ((column == IGNORE) | ((column >= 0) & (column < size))).all()
        assert (classes[:, place["objects"]] == len(scene.objects)).all()
        assert (classes[:, place["center"]] == 1).sum() == len(scene.objects)
        for rank, thing in enumerate(scene.objects):
            row = int(thing.y * 12) * 12 + int(thing.x * 12)
            assert classes[row, place["shape"]] == 1 + SHAPES.index(thing.shape)
            assert classes[row, place["color"]] == 1 + COLORS.index(thing.color)
            assert classes[row, place["rank"]] == rank
            assert np.abs(numbers[row, :OFFSETS]).max() < 4 / 12
        if scene.text is not None:
            letters = classes[:, place["character"]]
            assert len(set(letters[letters > 0].tolist())) >= len(set(scene.text.text.lower())) / 2


def _answer(question: str, scene) -> str | None:
    """Works a plainly phrased question out from the scene, by other code than the generator's.
    None: not understood.
    """
    words = (
        question.lower().strip("?.").replace("color", "colour").replace("crosses", "crosss").split()
    )
    words = [word.removesuffix("'s") for word in words]
    singular = [
        word.removesuffix("s") if word.removesuffix("s") in SHAPES else word for word in words
    ]
    shapes = [word for word in singular if word in SHAPES]
    colors = [word for word in words if word in COLORS]
    match = [
        thing for thing in scene.objects
        if (not shapes or thing.shape in shapes) and (not colors or thing.color in colors)
    ]  # fmt: skip
    if words[:2] == ["how", "many"] or words[0] == "count" or "number" in words[:4]:
        return str(len(match))
    if words[0] in ("is", "are", "do", "does", "can"):
        return "yes" if match else "no"
    if len(match) != 1:
        return f"{len(match)} candidates"
    if "colour" in words:
        return match[0].color
    if "where" in words or "position" in words or "part" in words:
        return match[0].position
    return match[0].shape


def test_every_question_has_the_right_answer_and_only_one(scenes):
    asked = 0
    for scene, turns in scenes:
        for turn in turns:
            if turn.kind in ("color", "shape", "where", "exists", "count"):
                assert _answer(turn.question, scene) == turn.answer, (turn, scene.objects)
                asked += 1
            elif turn.kind == "describe":
                assert turn.answer == description(scene)
                assert sum(named_objects(turn.answer).values()) == len(scene.objects) + (
                    scene.text is not None
                )
            else:
                assert turn.answer == scene.text.text.lower()
    assert asked > 3 * SCENES


def test_yes_and_no_are_balanced_and_phrasings_used(scenes):
    turns = [turn for _, asked in scenes for turn in asked]
    yes = [turn.answer == "yes" for turn in turns if turn.kind == "exists"]
    assert 0.4 < sum(yes) / len(yes) < 0.6
    assert any("color" in turn.question.lower() for turn in turns) and any(
        "colour" in turn.question.lower() for turn in turns
    )
    assert any(turn.question.endswith("?") for turn in turns) and any(
        turn.question[-1].isalpha() for turn in turns
    )
    assert len({turn.question.lower() for turn in turns if turn.kind == "describe"}) > len(
        PHRASINGS["describe"]
    )


@pytest.mark.parametrize(
    ("x", "y", "name"),
    [
        (0.5, 0.5, "center"),
        (0.2, 0.5, "left"),
        (0.85, 0.6, "right"),
        (0.5, 0.15, "top"),
        (0.45, 0.9, "bottom"),
        (0.2, 0.2, None),
    ],
)
def test_positions(x, y, name):
    assert position_name(x, y) == name
    assert name is None or name in POSITIONS


def test_curriculum_ends_at_the_full_mixture():
    start, end = curriculum(0.0), curriculum(0.5)
    assert start.counts[2:] == (0, 0, 0, 0) and end == Recipe()
    assert sum(curriculum(0.2).counts) == pytest.approx(1) and sum(
        curriculum(0.2).backgrounds
    ) == pytest.approx(1)


def test_shades_keep_their_names_apart():
    rng = np.random.default_rng(0)
    shades = {name: np.array([shade(name, rng) for _ in range(100)], float) for name in COLORS}
    assert all(((s >= 0) & (s <= 255)).all() for s in shades.values())
    for a in COLORS:
        for b in COLORS:
            if a < b:
                assert contrast(shades[a][:, None], shades[b][None]).min() > 20, (a, b)


def test_bad_names_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="kind"):
        background("stripes", 10, 10, rng)
    with pytest.raises(ValueError, match="shape"):
        shape_masks("hexagon", 10, True, rng)


def test_text_boxes_stand_in_order():
    mask, boxes = text_mask("2048", 30, np.random.default_rng(1))
    assert len(boxes) == 4 and all(
        a[2] <= b[0] + 1e-6 for a, b in zip(boxes, boxes[1:], strict=False)
    )
    assert boxes[-1][2] <= mask.width + 3


def test_pixels_are_pillows_bicubic():
    image = Image.effect_noise((70, 50), 40).convert("RGB")
    assert np.array_equal(
        pixels_of(image, 96), np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC))
    )


def test_tokenizer_spells_printed_words_and_keeps_question_words_whole(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("Is there a RED circle?\n")["input_ids"])
    assert pieces == ["is", "Ġthere", "Ġa", "Ġred", "Ġcircle", "?", "Ċ"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("4096")["input_ids"]) == list("4096")
    assert tokenizer.convert_ids_to_tokens(tokenizer("Swan")["input_ids"]) == list("swan")
    assert (
        tokenizer.decode(tokenizer("what is the 1st word, über?")["input_ids"])
        == "what is the 1st word, über?"
    )
    assert tokenizer.convert_tokens_to_ids("<image>") < len(tokenizer)


def test_chat_template_is_the_training_layout(tokenizer):
    talk = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What colour is the star?"}],
        },
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "text", "text": "Where is it?"}]},
    ]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "<image>What colour is the star?\nred<eos>Where is it?\n"


def test_labels_stand_on_answers_only(tokenizer):
    batch = ImageBatches(0, 4, 1000).make(900, tokenizer)
    trained = batch.labels != IGNORE
    assert torch.equal(batch.labels[trained], batch.input_ids[trained])
    assert (
        not trained[:, :144].any()
        and (batch.input_ids[:, :144] == tokenizer.convert_tokens_to_ids("<image>")).all()
    )
    assert not (trained & (batch.attention_mask == 0)).any()
    first = batch.input_ids[0][trained[0]]
    assert (first == tokenizer.eos_token_id).sum() >= 1


def test_scoring():
    turn = Turn("Describe it.", "a red circle and a blue ring", "describe")
    assert is_right(turn, "a blue ring and a red circle") and not is_right(turn, "a red circle")
    assert is_right(Turn("?", "left", "where"), "Left.") and not is_right(
        Turn("?", "left", "where"), "right"
    )


def test_held_out_images_are_their_own():
    (scene, turns), *_ = held_out(1)
    assert (
        isinstance(Case(scene.image, turns, len(scene.objects)).image, Image.Image)
        and turns[-1].kind == "describe"
    )
