"""decode_attention keeps its promises."""

import pytest
import torch
from backends import seeded

from fastppo import ops, reference

# Of the reference in float64 on the same inputs: float32 sums, then rounding to the output's dtype.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Query heads, key heads, width: grouped, one key head, vectors but no whole 64 bytes, no vector's multiple, more heads
# than a block of CUDA takes.
HEADS = [(9, 3, 64), (4, 1, 8), (3, 1, 40), (2, 2, 20), (7, 1, 130), (1, 1, 1)]
SLOTS, CAPACITY = 6, 300
PLACES = [5, 0, 3, 1, 2]
LENGTHS = [0, 1, 70, CAPACITY - 1, 128]  # empty, full, around a tile


def draw(heads=(4, 2, 8), dtype=torch.float32, rows=5, seed=0):
    """Return query, key, value, the two caches, slots, lengths. What no row has written is NaN."""
    generator, (queries, keys, width) = seeded(seed), heads
    q, k, v = (torch.randn(rows, h, width, generator=generator).to(dtype) for h in (queries, keys, keys))
    caches = [torch.randn(SLOTS, keys, CAPACITY, width, generator=generator).to(dtype) for _ in range(2)]
    slots, lengths = torch.tensor(PLACES)[:rows], torch.tensor(LENGTHS)[:rows]
    for cache in caches:
        cache[4] = torch.nan
        for slot, length in zip(PLACES[:rows], LENGTHS[:rows], strict=True):
            cache[slot, :, length:] = torch.nan
    return [q, k, v, *caches, slots, lengths]


def wide(inputs):
    return [x.double() if x.is_floating_point() else x for x in inputs]


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", HEADS)
def test_matches_the_float64_reference_and_ignores_what_was_never_written(heads, dtype, window):
    inputs = draw(heads, dtype)
    expected_inputs = wide(inputs)
    expected = reference.decode_attention(*expected_inputs, scale=heads[2] ** -0.5, window=window)
    out = ops.decode_attention(*inputs, scale=heads[2] ** -0.5, window=window)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    for cache, written in zip(inputs[3:5], expected_inputs[3:5], strict=True):
        assert torch.equal(cache.double().nan_to_num(9.0), written.nan_to_num(9.0))


def test_by_hand():
    # Scores ln 1 and ln 3: weights 1/4 and 3/4.
    q, k, v = torch.ones(1, 1, 1), torch.full((1, 1, 1), 3.0).log(), torch.full((1, 1, 1), 8.0)
    keys, values = torch.zeros(1, 1, 2, 1), torch.full((1, 1, 2, 1), 4.0)
    slots, lengths = torch.tensor([0]), torch.tensor([1])
    out = ops.decode_attention(q, k, v, keys, values, slots, lengths, scale=1.0)
    assert out.item() == pytest.approx(0.25 * 4 + 0.75 * 8)
    assert values.flatten().tolist() == [4, 8]
    assert ops.decode_attention(q, k, v, keys, values, slots, lengths, scale=1.0, window=1).item() == 8


def test_token_by_token_it_is_causal_attention():
    generator = seeded(1)
    tokens, width = 9, 8
    q, k, v = (torch.randn(2, h, tokens, width, generator=generator) for h in (4, 2, 2))
    keys, values = (torch.full((2, 2, tokens, width), torch.nan) for _ in range(2))
    outs = [
        ops.decode_attention(
            *(x[:, :, t] for x in (q, k, v)),
            keys,
            values,
            torch.tensor([1, 0]),
            torch.full((2,), t),
            scale=width**-0.5,
        )
        for t in range(tokens)
    ]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, *(x.repeat_interleave(2, dim=1) for x in (k, v)), is_causal=True
    )
    torch.testing.assert_close(torch.stack(outs, dim=2), expected, atol=2e-6, rtol=2e-6)


def test_any_strides_but_the_last_ones():
    inputs = draw(dtype=torch.bfloat16)
    plain = [x.clone() for x in inputs]
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:3]]
    strided += [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in inputs[3:5]]
    strided += [torch.stack([x, x], dim=1)[:, 0] for x in inputs[5:]]
    assert torch.equal(ops.decode_attention(*strided, scale=0.3), ops.decode_attention(*plain, scale=0.3))
    assert torch.equal(strided[3].nan_to_num(), plain[3].nan_to_num())


def test_rows_do_not_know_of_each_other_and_repeats_are_the_same_bits():
    inputs = draw((9, 3, 64), torch.bfloat16)
    together = ops.decode_attention(*[x.clone() for x in inputs], scale=0.1)
    for row in range(5):
        one = [x[row : row + 1] if i not in (3, 4) else x.clone() for i, x in enumerate(inputs)]
        assert torch.equal(ops.decode_attention(*one, scale=0.1)[0], together[row])
    assert torch.equal(ops.decode_attention(*inputs, scale=0.1), together)


def test_no_rows():
    inputs = draw(rows=0)
    assert ops.decode_attention(*inputs, scale=1.0).shape == (0, 4, 8)


def test_a_row_of_nan_is_nan_and_its_neighbours_are_not():
    inputs = draw()
    inputs[1][2] = torch.nan
    out = ops.decode_attention(*inputs, scale=0.3)
    assert out[2].isnan().all() and out[[0, 1, 3, 4]].isfinite().all()


def test_opcheck_and_whole_compilation():
    inputs = draw(rows=3)
    torch.library.opcheck(torch.ops.fastppo.decode_attention.default, (*inputs, 0.3, 5))
    compiled = torch.compile(
        lambda *x: ops.decode_attention(*x, scale=0.3), backend="aot_eager", fullgraph=True
    )
    fresh = [x.clone() for x in inputs]
    assert torch.equal(compiled(*inputs), ops.decode_attention(*fresh, scale=0.3))
    assert torch.equal(inputs[3].nan_to_num(), fresh[3].nan_to_num())


def changed(place, value):
    inputs = draw()
    inputs[place] = value(inputs[place])
    return inputs


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, lambda x: x.double(), "query must be float32, bfloat16 or float16, got float64"),
        (0, lambda x: x[0], r"query must have shape \(B, query heads, D\), got \(4, 8\)"),
        (0, lambda x: x[:, :3], "query heads must be a multiple of key heads, got 3 and 2"),
        (1, lambda x: x[..., :7], r"key must have shape \(5, key heads, 8\) .* got \(5, 2, 7\)"),
        (1, lambda x: x.bfloat16(), "key must be float32, got bfloat16"),
        (2, lambda x: x[:, :1], r"value must have shape \(5, 2, 8\) like key, got \(5, 1, 8\)"),
        (
            3,
            lambda x: x[:, :1],
            r"key_cache must have shape \(slots, 2, capacity, 8\) .* got \(6, 1, 300, 8\)",
        ),
        (4, lambda x: x[:5], r"value_cache must have shape \(6, 2, 300, 8\) like key_cache"),
        (4, lambda x: x.bfloat16(), "value_cache must be float32, got bfloat16"),
        (5, lambda x: x.int(), "slots must be int64, got int32"),
        (6, lambda x: x[:4], r"lengths must have shape \(5,\), one per row of query, got \(4,\)"),
    ],
)
def test_bad_arguments_are_named(place, value, message):
    with pytest.raises(ValueError, match="decode_attention: " + message):
        ops.decode_attention(*changed(place, value), scale=0.3)


def test_bad_numbers_and_layouts_are_named():
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        ops.decode_attention(*draw(), scale=float("nan"))
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        ops.decode_attention(*draw(), scale=1.0, window=0)
    inputs = changed(3, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3))
    with pytest.raises(ValueError, match="key_cache must have a last dimension of stride 1, got stride 300"):
        ops.decode_attention(*inputs, scale=1.0)


@pytest.mark.parametrize(
    ("place", "row", "value", "message"),
    [
        (5, 3, SLOTS, r"slots must be in \[0, 6\), got 6 in row 3"),
        (5, 1, -1, r"slots must be in \[0, 6\), got -1 in row 1"),
        (5, 4, 0, "slots must differ from row to row, got 0 again in row 4"),
        (6, 2, CAPACITY, r"lengths must be in \[0, 300\), to leave room for the new token, got 300 in row 2"),
        (6, 0, -1, r"lengths must be in \[0, 300\)"),
    ],
)
def test_rows_without_a_place(place, row, value, message, backend):
    inputs = draw()
    inputs[place][row] = value
    if backend == "cpu":
        with pytest.raises(ValueError, match=message):
            ops.decode_attention(*inputs, scale=0.3)
    elif "again" not in message:  # nobody waits for the device: NaN, and nothing is written
        before = inputs[3].clone()
        out = ops.decode_attention(*inputs, scale=0.3)
        assert out[row].isnan().all() and out[[i for i in range(5) if i != row]].isfinite().all()
        assert torch.equal(inputs[3][4].nan_to_num(), before[4].nan_to_num())
