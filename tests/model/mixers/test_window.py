"""Window attention against its formula, token by token, and its limiting cases."""

import math

import pytest
import torch

from core.errors import UserError
from model.mixers.attention import Attention
from model.mixers.window import WindowAttention
from model.stream import Stream
from tests.model.reference import agree


def slow(p, x_BTD, grid, window, shift, heads):
    """Each token attends to those of its shifted window that are as near in the image as there."""
    window = tuple(min(w, g) for w, g in zip((window, window), grid, strict=True))
    shift = tuple(w // 2 if shift and g > w else 0 for w, g in zip(window, grid, strict=True))
    filled = tuple(math.ceil(g / w) * w for g, w in zip(grid, window, strict=True))
    width = p["q.weight"].shape[0] // heads
    x = torch.zeros(x_BTD.shape[0], *filled, x_BTD.shape[2], dtype=x_BTD.dtype)
    x[:, : grid[0], : grid[1]] = x_BTD.unflatten(1, grid)
    q, k, v = (x @ p[f"{n}.weight"].T + p[f"{n}.bias"] for n in "qkv")

    def moved(at):
        return tuple((a - s) % f for a, s, f in zip(at, shift, filled, strict=True))

    def sees(a, b):
        there = list(zip(moved(a), moved(b), window, strict=True))
        together = all(i // w == j // w for i, j, w in there)
        near = all(i - j == m - n for (i, j, _), m, n in zip(there, a, b, strict=True))
        return together and near

    places = [(r, c) for r in range(filled[0]) for c in range(filled[1])]
    rows = []
    for a in [(r, c) for r in range(grid[0]) for c in range(grid[1])]:
        keys = [b for b in places if sees(a, b)]
        parts = []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            scores = torch.stack(
                [
                    (q[:, a[0], a[1], own] * k[:, b[0], b[1], own]).sum(-1) / math.sqrt(width)
                    + p["position.table.weight"][
                        h, a[0] - b[0] + window[0] - 1, a[1] - b[1] + window[1] - 1
                    ]
                    for b in keys
                ],
                -1,
            )
            values = torch.stack([v[:, b[0], b[1], own] for b in keys], 1)
            parts.append((scores.softmax(-1)[..., None] * values).sum(1))
        rows.append(torch.cat(parts, -1))
    return torch.stack(rows, 1) @ p["out.weight"].T + p["out.bias"]


def images(grid, dim=8, seed=0):
    return torch.randn(2, grid[0] * grid[1], dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", ["none", "half"])
@pytest.mark.parametrize(
    ("grid", "window"), [((4, 4), 2), ((6, 3), 3), ((5, 4), 3), ((4, 7), 4), ((2, 2), 7)]
)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_window_attention_is_its_formula(grid, window, shift, backend):
    mixer = WindowAttention(
        8, grid, window=window, shift=shift, heads=2, position="relative_grid", backend=backend
    )
    agree(
        mixer,
        lambda p, x: slow(p, x, grid, window, shift == "half", 2),
        images(grid),
        call=lambda x: mixer(x, Stream(x, grid=grid)),
    )


def test_one_window_is_attention():
    grid = (3, 4)
    mixer = WindowAttention(8, grid, index=1, window=4, heads=2)
    whole = Attention(8, heads=2, bias=True)
    whole.load_state_dict(mixer.state_dict())
    x = images(grid)
    stream = Stream(x, grid=grid)
    torch.testing.assert_close(mixer(x, stream), whole(x, stream))


def test_auto_shifts_every_second_block():
    x = images((4, 4))
    plain, shifted, auto = (
        WindowAttention(8, (4, 4), index, window=2, shift=shift, heads=2)
        for index, shift in ((1, "none"), (0, "half"), (1, "auto"))
    )
    for mixer in (shifted, auto):
        mixer.load_state_dict(plain.state_dict())
    out = [m(x, Stream(x, grid=(4, 4))) for m in (plain, shifted, auto)]
    assert torch.equal(out[1], out[2])
    assert not torch.allclose(out[0], out[1])
    even = WindowAttention(8, (4, 4), 2, window=2, heads=2)
    even.load_state_dict(plain.state_dict())
    assert torch.equal(even(x, Stream(x, grid=(4, 4))), out[0])


def test_a_smaller_image_uses_the_middle_of_the_table():
    built = WindowAttention(8, (4, 4), window=4, heads=2, position="relative_grid")
    small = WindowAttention(8, (2, 3), window=4, heads=2, position="relative_grid")
    state = built.state_dict()
    table = state["position.table.weight"]
    small.load_state_dict({**state, "position.table.weight": table[:, 2:5, 1:6]})
    x = images((2, 3))
    stream = Stream(x, grid=(2, 3))
    torch.testing.assert_close(built(x, stream), small(x, stream))


def test_mistakes_are_told():
    with pytest.raises(UserError, match="needs the grid"):
        WindowAttention(8, None)
    with pytest.raises(UserError, match="class token has no place"):
        WindowAttention(32, (4, 4), max_length=17)
    with pytest.raises(UserError, match=r"dim \(8\) must be a multiple of heads \(3\)"):
        WindowAttention(8, (4, 4), heads=3)
    with pytest.raises(UserError, match="dim"):
        WindowAttention(8, (4, 4), head_dim=32)
