"""The key-value cache, against lists of tensors that are joined."""

import pytest
import torch

from mllama.nn.kv_cache import CACHE_DTYPES, KVCache
from mllama.ops import dequantize_rows, quantize_rows

B, KV, D = 3, 2, 5


def new(length: int, batch: int = B, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, length, KV, D).to(dtype)


def test_positions_are_appended_and_read_back_whatever_the_capacity():
    for capacity in (0, 4, 100):
        cache, given = KVCache(2, capacity), []
        for length in (7, 1, 1, 6, 2, 1):
            assert cache.length == sum(k.shape[1] for k, _ in given)
            assert cache.num_keys(length) == cache.length + length
            given.append((new(length), new(length)))
            for layer in (0, 1):
                k, v = cache.update(layer, given[-1][0] + layer, given[-1][1] - layer)
                assert torch.equal(k, torch.cat([pair[0] for pair in given], 1) + layer)
                assert torch.equal(v, torch.cat([pair[1] for pair in given], 1) - layer)


def test_every_head_is_contiguous_and_capacity_doubles():
    cache, capacities = KVCache(1), []
    for _ in range(9):
        k, _ = cache.update(0, new(1), new(1))
        buffer = k._base if k._base is not None else k
        assert k.stride()[1:] == (D, k.stride(2), 1) and k.stride(2) % D == 0
        capacities.append(k.stride(2) // D)
        assert buffer.numel() == B * KV * D * capacities[-1]
    assert capacities == [1, 2, 4, 4, 8, 8, 8, 8, 16]


def test_capacity_is_made_room_for_at_once():
    cache = KVCache(1, capacity=16)
    first, _ = cache.update(0, new(3), new(3))
    for _ in range(13):
        k, _ = cache.update(0, new(1), new(1))
    assert k.data_ptr() == first.data_ptr() and cache.length == 16
    assert cache.update(0, new(1), new(1))[0].data_ptr() != first.data_ptr()


def test_the_length_is_that_of_layers_that_attend_to_text():
    cache = KVCache(3)
    cache.update_cross(0, new(9), new(9))
    assert cache.length == 0
    cache.update(1, new(4), new(4))
    assert cache.length == 4


def test_images_are_appended_beside_the_text_and_outlive_it():
    cache, images, none = KVCache(2), new(4), new(0)
    k, v = cache.update_cross(1, none, none)
    assert k.shape == v.shape == none.shape
    cache.tile_mask = torch.tensor([True, False])
    assert torch.equal(cache.update_cross(1, images, images + 1)[1], images + 1)
    cache.update(0, new(6), new(6))
    cache.crop(0)
    assert torch.equal(cache.update_cross(1, none, none)[0], images)
    more = new(2)
    assert torch.equal(cache.update_cross(1, more, more)[0], torch.cat([images, more], 1))
    assert cache.length == 0 and cache.tile_mask.tolist() == [True, False]


def test_cropped_positions_are_written_anew():
    cache, first, second = KVCache(2), new(6), new(2)
    for layer in (0, 1):
        cache.update(layer, first, first)
    cache.num_prefix_tokens = 3
    cache.crop(4)
    assert (cache.length, cache.num_prefix_tokens) == (4, 3)
    for layer in (0, 1):
        k, _ = cache.update(layer, second, second)
        assert torch.equal(k, torch.cat([first[:, :4], second], 1))
    cache.crop(2)
    assert cache.num_prefix_tokens == 2
    for length in (-1, 3):
        with pytest.raises(ValueError, match="length"):
            cache.crop(length)


def stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:
        return dequantize_rows(quantize_rows(x), x.shape[-1], x.dtype)
    return x.to(dtype).to(x.dtype)


@pytest.mark.parametrize("dtype", CACHE_DTYPES.values(), ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_dtype_of_its_own(dtype, given):
    cache, rows = KVCache(2, dtype=dtype), torch.tensor([2, 0])
    text, images, more = (new(length, dtype=given) for length in (5, 3, 2))
    k, v = cache.update(0, text, text + 1)
    assert k.dtype == given and torch.equal(k, stored(text, dtype))
    assert torch.equal(v, stored(text + 1, dtype))
    cache.update_cross(1, images, images)
    cache.crop(4)
    cache.reorder(rows)
    k, _ = cache.update(0, more[rows], more[rows])  # the buffer grows
    assert torch.equal(k, stored(torch.cat([text[rows, :4], more[rows]], 1), dtype))
    none = new(0, 2, dtype=given)
    assert torch.equal(cache.update_cross(1, none, none)[1], stored(images[rows], dtype))
    keys, values, image_keys = cache.reserve(3, [1])
    assert {x.dtype for x in (*keys, *values)} == {dtype} and image_keys == 3
    with pytest.raises(ValueError, match="k and v"):
        cache.update(0, new(1, 2, dtype=given)[..., :4], new(1, 2, dtype=given))


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, "int8"])
def test_dtypes_that_are_refused(dtype):
    with pytest.raises(ValueError, match="dtype"):
        KVCache(1, dtype=dtype)


def test_an_interrupted_pass_is_taken_back():
    cache, first = KVCache(2), new(5)
    for layer in (0, 1):
        cache.update(layer, first, first)
    cache.update(0, new(1), new(1))  # the second layer never came
    cache.crop(5)
    again = new(1)
    for layer in (0, 1):
        assert torch.equal(cache.update(layer, again, again)[0], torch.cat([first, again], 1))


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0, 0, 2, 2], [2], [0, 0, 0]])
def test_rows_are_reordered_repeated_and_selected(rows):
    cache, text, images = KVCache(2, capacity=8), new(4), new(3)
    cache.update(0, text, text + 1)
    cache.update_cross(1, images, images + 1)
    cache.reorder(torch.tensor(rows))
    more = new(1, len(rows))
    k, v = cache.update(0, more, more)
    assert torch.equal(k, torch.cat([text[rows], more], 1))
    assert torch.equal(v, torch.cat([text[rows] + 1, more], 1))
    none = new(0, len(rows))
    assert torch.equal(cache.update_cross(1, none, none)[1], images[rows] + 1)


def test_reset_forgets_all_and_takes_another_batch_and_dtype():
    cache, again = KVCache(2, capacity=8), new(5)
    first, _ = cache.update(0, new(3), new(3))
    cache.update_cross(1, new(2), new(2))
    cache.num_prefix_tokens, cache.tile_mask = 2, torch.ones(1, dtype=torch.bool)
    cache.reset()
    assert (cache.length, cache.num_prefix_tokens, cache.tile_mask) == (0, 0, None)
    k, _ = cache.update(0, again, again)
    assert torch.equal(k, again) and k.data_ptr() == first.data_ptr()
    assert cache.update_cross(1, new(0), new(0))[0].shape[1] == 0
    cache.reset()
    other = new(2, batch=1, dtype=torch.bfloat16)
    k, _ = cache.update(0, other, other)
    assert torch.equal(k, other) and k.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("k", "v"),
    [
        (new(1, batch=1), new(1, batch=1)),
        (new(1, batch=4), new(1, batch=4)),
        (new(1)[:, :, :1], new(1)[:, :, :1]),
        (new(1)[..., :4], new(1)),
        (new(1, dtype=torch.bfloat16), new(1)),
        (new(2), new(1)),
        (new(1)[0], new(1)[0]),
    ],
)
def test_what_does_not_go_on_from_the_cache_is_refused_and_leaves_it(k, v):
    cache, first = KVCache(2, capacity=8), new(3)
    for update in (cache.update, cache.update_cross):
        update(0, first, first)
        with pytest.raises(ValueError, match="k and v"):
            update(0, k, v)
        more = new(2)
        assert torch.equal(update(0, more, more)[1], torch.cat([first, more], 1))


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda cache: KVCache(0), ValueError, "num_layers"),
        (lambda cache: KVCache(2.0), TypeError, "num_layers"),
        (lambda cache: KVCache(2, -1), ValueError, "capacity"),
        (lambda cache: cache.update(2, new(1), new(1)), IndexError, "layer"),
        (lambda cache: cache.update_cross(-1, new(1), new(1)), IndexError, "layer"),
        (lambda cache: cache.crop(1.5), TypeError, "length"),
        (lambda cache: cache.crop(True), TypeError, "length"),
        (lambda cache: cache.reorder([0]), TypeError, "rows"),
        (lambda cache: cache.reorder(torch.tensor([True, False, True])), TypeError, "rows"),
        (lambda cache: cache.reorder(torch.tensor([[0]])), ValueError, "rows"),
        (lambda cache: cache.reorder(torch.tensor([-1])), ValueError, "rows"),
        (lambda cache: cache.reorder(torch.tensor([3])), ValueError, "rows"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, error, name):
    cache, first = KVCache(2), new(2)
    cache.update(0, first, first)
    with pytest.raises(error, match=name):
        call(cache)
    assert torch.equal(cache.update(0, new(0), new(0))[0], first)


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_images_are_taken_over_from_another_cache_without_a_copy(dtype):
    first, second = KVCache(3, dtype=dtype), KVCache(3, dtype=dtype)
    given = first.update_cross(1, new(4), new(4))
    keys, mask = first.image_keys(), torch.tensor([True])
    assert list(keys) == [1]
    second.update_cross(1, new(9), new(9))
    second.update_cross(2, new(9), new(9))
    second.set_image_keys(keys, mask)
    none = new(0)
    assert all(map(torch.equal, second.update_cross(1, none, none), given))
    assert second.update_cross(2, none, none)[0].shape[1] == 0 and second.tile_mask is mask
    assert second.image_keys()[1][0].data_ptr() == keys[1][0].data_ptr()
    more = second.update_cross(1, new(2), new(2))  # others are appended elsewhere
    assert more[0].shape[1] == 6 and torch.equal(more[0][:, :4], given[0])
    second.set_image_keys(keys, mask)
    second.reset()
    second.update_cross(1, new(4), new(4))
    assert all(map(torch.equal, first.update_cross(1, none, none), given))
    with pytest.raises(IndexError, match="layer"):
        second.set_image_keys({3: keys[1]}, mask)


def test_padding_moves_before_the_positions_it_is_behind():
    cache, k, v = KVCache(2, capacity=20), new(9), new(9)
    cache.update(1, k, v)
    cache.move_padding(2, 4, [0, 2, 1])
    found = cache.update(1, new(1), new(1))
    for row, count in enumerate((0, 2, 1)):
        for moved, given in zip(found, (k, v), strict=True):
            assert torch.equal(moved[row, :2], given[row, :2])
            assert torch.equal(moved[row, 2 + count : 6 + count], given[row, 2:6])
            assert torch.equal(moved[row, 6 + count : 9], given[row, 6 + count :])
    for arguments in ((2, 4, [0, 5, 1]), (-1, 4, [0, 0, 0]), (9, 3, [])):
        with pytest.raises(ValueError, match="start, length and padding"):
            cache.move_padding(*arguments)
