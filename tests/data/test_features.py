"""Features of a frozen encoder in files: found again, and never another image's or model's."""

import copy

import pytest
import torch

import mllama
import tiny
from data.test_collate import loaded, open_gates
from helpers import counted_images
from mllama.data.collate import Collator
from mllama.data.features import FeatureCache
from mllama.data.sources import open_examples
from mllama.runtime.fingerprint import fingerprint
from tiny import data


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return list(open_examples(data.write(tmp_path_factory.mktemp("data"))))


def frozen(family: str, family_folder):
    """A model whose encoder is frozen, in training, and a batch with four images."""
    model, processor = loaded(family, family_folder)
    open_gates(model)
    for _, module in model.encoder_modules():
        module.requires_grad_(False)
    return model.train(), processor


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llava, siglip", "paligemma", "mllama", "added layers"])
@pytest.mark.parametrize("pack", [False, True])
def test_loss_and_gradients_are_those_of_pixels(family, pack, family_folder, examples, tmp_path):
    model, processor = frozen(family, family_folder)
    rows = [examples[1], examples[2]] if family == "paligemma" else examples
    batch = Collator(model, processor, max_length=200 if pack else None, pack=pack)(rows)
    count = (batch["labels"] != -100).sum()
    expected = model(**batch, num_items_in_batch=count).loss
    expected.backward()
    wanted = gradients(model)
    assert wanted and not any(name.startswith("vision_tower") for name in wanted)
    for fresh in (True, False):
        cache = FeatureCache(model, tmp_path / "cache")
        with counted_images(model) as computed:
            replaced = cache.replace(batch)
        files = len(list((tmp_path / "cache").iterdir()))
        assert computed.call_count == (files if fresh else 0) and files >= 2
        assert "pixel_values" not in replaced and "pixel_values" in batch
        loss = model(**replaced, num_items_in_batch=count).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
        found = gradients(model)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name


@pytest.fixture
def small(tmp_path):
    """(make(): a new cache on the folder, the model, a batch of two images)."""
    model = tiny.model()
    for _, module in model.encoder_modules():
        module.requires_grad_(False)
    model.train()
    batch = tiny.batch(*([tiny.IMAGE] * tiny.PATCHES + tiny.tokens(4, seed) for seed in (1, 2)))
    batch["pixel_values"] = tiny.images(2)

    def computed(batch, **options) -> int:
        with counted_images(model) as images:
            FeatureCache(model, tmp_path / "cache", **options).replace(batch)
        return images.call_count

    return computed, model, batch


def test_what_changes_is_computed_again(small):
    computed, model, batch = small
    assert [computed(batch) for _ in range(2)] == [2, 0]
    pixels = batch["pixel_values"].clone()
    pixels[1, 0, 3, 3] += 1e-3
    assert computed(batch | {"pixel_values": pixels}) == 1
    assert computed(batch | {"pixel_values": pixels.flip(0)}) == 0
    model.eval()
    assert computed(batch) == 0 and not model.vision_tower.training
    model.train()
    assert computed(batch) == 0 and all(part.training for part in model.modules())
    with torch.no_grad():
        model.vision_tower.encoder.layers[0].mlp.fc1.weight[0, 0] += 1e-3
    assert computed(batch) == 2
    model.multi_modal_projector.linear_1.bias.data[0] += 1e-3
    assert [computed(batch) for _ in range(2)] == [2, 0]
    with torch.no_grad():  # the decoder is trained
        model.language_model.layers[0].mlp.up_proj.weight += 0.1
    assert computed(batch) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert computed(batch) == 2


def write(model) -> None:
    with torch.no_grad():
        model.vision_tower.encoder.layers[0].mlp.fc1.weight[0] += 1


def load(model) -> None:
    state = model.vision_tower.state_dict()
    model.vision_tower.load_state_dict({name: 2 * value for name, value in state.items()})


def put(model) -> None:
    projection = model.multi_modal_projector.linear_1.weight
    projection.data = projection.data * 2


def replace(model) -> None:
    projector = model.multi_modal_projector
    projector.linear_2 = copy.deepcopy(projector.linear_2)
    projector.linear_2.weight.data.mul_(2)  # torch counts no write


def widen(model) -> None:
    model.vision_tower.encoder.layers[0].layer_norm1.eps = 1.0


@pytest.mark.parametrize("change", [write, load, put, replace, widen])
def test_a_cache_notices_what_changes_while_it_is_used(small, tmp_path, change):
    _, model, batch = small
    cache = FeatureCache(model, tmp_path / "cache")
    before = cache.replace(batch)["image_features"]
    change(model)
    after = cache.replace(batch)["image_features"]
    assert not torch.equal(before, after)
    expected = FeatureCache(model, tmp_path / "other").replace(batch)["image_features"]
    assert torch.equal(after, expected)


def test_weights_are_read_once(small, tmp_path, monkeypatch):
    _, model, batch = small
    cache, reads = FeatureCache(model, tmp_path / "cache"), []
    monkeypatch.setattr(
        "mllama.runtime.image_cache.fingerprint", lambda of: reads.append(1) or fingerprint(of)
    )
    for seed in range(3):
        cache.replace(batch | {"pixel_values": tiny.images(2, seed)})
        with torch.no_grad():  # the decoder is trained
            model.language_model.layers[0].mlp.up_proj.weight += 0.1
    assert len(reads) == 1
    write(model)
    cache.replace(batch)
    assert len(reads) == 2


def test_layers_that_read_features_may_be_trained(family_folder, examples, tmp_path):
    """Cross-attention layers' keys are no part of the features."""
    model, processor = frozen("mllama", family_folder)
    batch = Collator(model, processor)(examples[:1])
    cache = FeatureCache(model, tmp_path)
    cache.replace(batch)
    mllama.convert_linears_to_lora(model.language_model, rank=2)
    layer = model.spec.text.cross_attention_layers[0]
    with torch.no_grad():
        model.language_model.layers[layer].cross_attn.k_proj.lora_b.weight.add_(1)
    with counted_images(model) as images:
        FeatureCache(model, tmp_path).replace(batch)
    assert images.call_count == 0


def test_broken_files_are_computed_again(small, tmp_path):
    computed, _, batch = small
    computed(batch)
    paths = sorted((tmp_path / "cache").iterdir())
    assert len(paths) == 2
    content = bytearray(paths[0].read_bytes())
    content[-5] ^= 1
    paths[0].write_bytes(content)
    paths[1].write_bytes(paths[1].read_bytes()[:50])
    assert [computed(batch) for _ in range(2)] == [2, 0]


def test_the_folder_stays_within_its_limit(small, tmp_path):
    computed, _, batch = small
    for seed in range(40):
        computed(batch | {"pixel_values": tiny.images(2, seed)}, max_bytes=20_000)
        size = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
        assert size <= 20_000
    assert size > 15_000


def test_text_alone_stays_as_it_is(small, tmp_path):
    _, model, _ = small
    batch = tiny.texts()
    assert FeatureCache(model, tmp_path / "cache").replace(batch).keys() == batch.keys()


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_a_trained_encoder_is_rejected(small, tmp_path, part):
    _, model, batch = small
    cache = FeatureCache(model, tmp_path / "cache")
    mllama.convert_linears_to_lora(getattr(model, part), rank=2)
    with pytest.raises(ValueError, match=part):
        cache.replace(batch)
    with pytest.raises(ValueError, match=part):
        FeatureCache(model, tmp_path / "cache")


def test_hooks_dropout_and_models_without_images_are_rejected(small, tmp_path, family_folder):
    _, model, batch = small
    with pytest.raises(TypeError):
        FeatureCache(model, 7)
    with pytest.raises(ValueError, match="max_folder_bytes"):
        FeatureCache(model, tmp_path, max_bytes=0)
    handle = model.vision_tower.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        FeatureCache(model, tmp_path)
    handle.remove()
    text, _ = mllama.load(family_folder("llama"), dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="images"):
        FeatureCache(text, tmp_path)
    dropping = tiny.model(vision={"attention_dropout": 0.5}).requires_grad_(False)
    assert FeatureCache(dropping.eval(), tmp_path)
    with pytest.raises(ValueError, match="dropout"):
        FeatureCache(dropping.train(), tmp_path)
