"""Rows: each one reads what it wrote and writes what it read, names, shapes and values."""

import pytest
import torch

from mllama.weights.rows import (
    Concat,
    Drop,
    Permute,
    Rename,
    Reshape,
    Row,
    Shift,
    Split,
    file_names,
    plan_moves,
    to_file,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(table, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    moves, unknown, twice = plan_moves(table, given)
    assert not unknown and not twice
    ours = {}
    for move in moves:
        ours |= zip(move.ours, move.row.read([given[name] for name in move.theirs]), strict=True)
    return ours


ROWS = {
    "rename": (Rename("a.*", "x.*"), {"x.w": (3, 2), "x.{}.b": (4,)}),
    "layers": (Rename("a.{}.q", "x.{}.wq"), {"x.0.wq": (3, 2), "x.11.wq": (3, 2)}),
    "layers and a rest": (Rename("a.{}.*", "x.{}.y.*"), {"x.0.y.w": (3, 2), "x.7.y.b.c": (3,)}),
    "other layers": (
        Rename("a.{}.q", "x.{}.wq", index={0: 3, 1: 8}),
        {"x.0.wq": (3, 2), "x.1.wq": (3, 2)},
    ),
    "permute": (Rename("a.*", "x.*", steps=[Permute(3)]), {"x.w": (24, 5), "x.b": (24,)}),
    "reshape": (Rename("a", "x", steps=[Reshape((2, 3, 2, 2), (2, 12))]), {"x": (2, 12)}),
    "shift": (Rename("a", "x", steps=[Shift(-1.0)]), {"x": (6,)}),
    "several steps": (
        Rename("a", "x", steps=[Reshape((8, 3), (24,)), Permute(2), Shift(0.5)]),
        {"x": (24,)},
    ),
    "concat": (Concat("a.{}", ["x.{}.q", "x.{}.k"]), {"x.0.q": (3, 2), "x.0.k": (3, 2)}),
    "concat of sizes": (
        Concat("a", ["x", "y", "z"], dim=1, sizes=(1, 4, 2)),
        {"x": (3, 1), "y": (3, 4), "z": (3, 2)},
    ),
    "split": (Split(["a.q", "a.k", "a.v"], "x.qkv"), {"x.qkv": (6, 2)}),
    "split of sizes": (
        Split(["a.{}.*", "b.{}.*"], "x.{}.*", dim=-1, sizes=(3, 1)),
        {"x.0.w": (2, 4), "x.12.b": (4,)},
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ROWS)
def test_read_and_write_are_inverse(case, seed):
    row, shapes = ROWS[case]
    given = {name: random(*shape, seed=seed) for name, shape in shapes.items()}
    ours = read([row], given)
    assert not ours.keys() & given.keys()
    again = to_file([row], ours)
    assert again.keys() == given.keys()
    assert all(
        torch.allclose(again[name], value, rtol=0, atol=1e-6) and again[name].shape == value.shape
        for name, value in given.items()
    )
    once_more = read([row], again)
    assert once_more.keys() == ours.keys() and all(
        torch.equal(once_more[name], value) for name, value in ours.items()
    )
    for name in ours:
        assert set(file_names([row], name)) <= given.keys()


def test_permute_turns_neighbours_into_halves():
    heads, size = 2, 6
    pairs = torch.tensor([[10 * head + i for i in range(size)] for head in range(heads)]).reshape(
        -1, 1
    )
    halves = Permute(heads).read(pairs)
    assert halves.flatten().tolist() == [0, 2, 4, 1, 3, 5, 10, 12, 14, 11, 13, 15]


def test_values_of_the_other_steps():
    assert Shift(-1.0).read(torch.tensor([3.0])).item() == 2.0
    assert Concat("a", ["x", "y"]).read([torch.zeros(1), torch.ones(1)])[0].tolist() == [0, 1]
    assert [part.item() for part in Split(["a", "b"], "x").read([torch.tensor([0, 1])])] == [0, 1]


@pytest.mark.parametrize(
    ("row", "shapes"),
    [
        (Rename("a", "x", steps=[Reshape((2, 2), (4,))]), [(2, 2)]),
        (Rename("a", "x", steps=[Permute(3)]), [(8, 2)]),
        (Concat("a", ["x", "y"]), [(2, 2), (3, 2)]),
        (Concat("a", ["x", "y"], sizes=(2, 3)), [(3, 2), (2, 2)]),
        (Split(["a", "b"], "x"), [(3,)]),
        (Split(["a", "b"], "x", sizes=(1, 1)), [(3,)]),
    ],
)
def test_shapes_that_cannot_be_are_refused(row: Row, shapes):
    with pytest.raises((ValueError, RuntimeError)):
        row.read([torch.empty(shape, device="meta") for shape in shapes])


def test_the_first_row_that_knows_a_name_decides():
    table = [Drop("x.head.*"), Rename("a.q", "x.wq"), Rename("a.*", "x.*")]
    assert read(
        table, {"x.head.w": torch.zeros(1), "x.wq": torch.ones(1), "x.k": torch.zeros(1)}
    ).keys() == {"a.q", "a.k"}
    assert plan_moves(table, ["y"])[1] == ["y"]


def test_further_spellings_are_read_and_not_written():
    row = Rename("a.*", "x.*", also=("y.*", "z.y.*"))
    for spelling in ("x.w", "y.w", "z.y.w"):
        assert plan_moves([row], [spelling])[0][0].ours == ["a.w"]
    assert file_names([row], "a.w") == ["x.w"]
    assert plan_moves([row], ["x.w", "y.w"])[2] == ["x.w and y.w"]
    fused = Split(["q", "k"], "x.qk", also=("y.qk",))
    assert plan_moves([fused], ["y.qk"])[0][0].ours == ["q", "k"]


def test_what_only_part_of_a_file_has_is_told_by_name():
    (move,), _, _ = plan_moves([Concat("a.{}", ["x.{}.q", "x.{}.k"])], ["x.4.k"])
    assert (
        move.theirs == [None, "x.4.k"]
        and move.written == ["x.4.q", "x.4.k"]
        and move.ours == ["a.4"]
    )
    with pytest.raises(ValueError, match="x cannot be written without b"):
        to_file([Split(["a", "b"], "x")], {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="no place"):
        to_file([Rename("a", "x")], {"surprise": torch.zeros(1)})


@pytest.mark.parametrize(
    "name",
    ["x..wq", "x.-1.wq", "x.01.wq", "x.1.0.wq", "x.٣.wq", "x.999999.wq", "x.0.wq\n", "x.0.wq.more"],
)
def test_odd_numbers_are_no_layers(name):
    assert plan_moves([Rename("a.{}.q", "x.{}.wq")], [name])[1] == [name]


def test_a_layer_outside_the_index_is_not_the_rows():
    row = Rename("a.{}.q", "x.{}.wq", index={0: 3})
    assert plan_moves([row], ["x.1.wq"])[1] == ["x.1.wq"]
    with pytest.raises(ValueError, match="no place"):
        file_names([row], "a.0.q")
