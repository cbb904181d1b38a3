"""varlen_attention keeps its promises, on the CPU; other devices have FlashAttention."""

import itertools

import pytest
import torch
from backends import seeded

from fastppo import ops, reference

# Of the reference in float64 on the same inputs: float32 sums, then rounding to the output's dtype.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
# Query heads, key heads, width: grouped, one key head, no vector's multiple, more than a tile of columns.
HEADS = [(9, 3, 64), (4, 1, 8), (2, 2, 20), (3, 1, 130), (1, 1, 1)]
# (queries, keys) of each sequence: alone, after a beginning, empty, around a tile of 32 queries and a register of 16.
LENGTHS = [(1, 1), (5, 5), (3, 40), (0, 7), (0, 0), (33, 33), (32, 48), (70, 79), (1, 200)]


def draw(heads=(4, 2, 8), dtype=torch.float32, lengths=LENGTHS, seed=0):
    """Query, key, value, cu_seqlens_q, cu_seqlens_k."""
    generator, (queries, keys, width) = seeded(seed), heads
    m, n = (torch.tensor([0, *part]).cumsum(0) for part in zip(*lengths, strict=True))
    tensors = [
        torch.randn(int(tokens), h, width, generator=generator).to(dtype)
        for tokens, h in ((m[-1], queries), (n[-1], keys), (n[-1], keys))
    ]
    return [*tensors, m, n]


def gradients(function, inputs, grad, **settings):
    tensors = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    out = function(*tensors, *inputs[3:], **settings)
    return out.detach(), torch.autograd.grad(out, tensors, grad.to(out.dtype))


@pytest.mark.parametrize("window", [None, 1, 9, 1000])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", HEADS)
def test_matches_the_float64_reference_forward_and_backward(heads, dtype, window):
    inputs = draw(heads, dtype)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    grad = torch.randn(inputs[0].shape, generator=seeded(1)).to(dtype)
    settings = {"scale": heads[2] ** -0.5, "window": window}
    expected, expected_grads = gradients(reference.varlen_attention, wide, grad, **settings)
    out, grads = gradients(ops.varlen_attention, inputs, grad, **settings)
    assert out.dtype == dtype and out.is_contiguous()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert ours.dtype == dtype
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours.double(), theirs, atol=2 * tolerance * scale, rtol=2 * tolerance)


def test_by_hand():
    # One query at the last of two keys: scores ln 1 and ln 3, weights 1/4 and 3/4.
    query, key = torch.ones(1, 1, 1), torch.tensor([1.0, 3.0]).log().view(2, 1, 1)
    value = torch.tensor([4.0, 8.0]).view(2, 1, 1)
    borders = torch.tensor([0, 1]), torch.tensor([0, 2])
    out = ops.varlen_attention(query, key, value, *borders, scale=1.0)
    assert out.item() == pytest.approx(0.25 * 4 + 0.75 * 8)
    assert ops.varlen_attention(query, key, value, *borders, scale=1.0, window=1).item() == 8


def test_it_is_torchs_causal_attention_of_each_sequence():
    lengths = [(n, n) for n in (1, 17, 64, 100)]
    query, key, value, borders, _ = inputs = draw((6, 2, 16), lengths=lengths)
    out = ops.varlen_attention(*inputs, scale=0.25)
    for begin, end in itertools.pairwise(borders.tolist()):
        q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (query, key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=0.25, enable_gqa=True
        )
        torch.testing.assert_close(out[begin:end], expected[0].transpose(0, 1), atol=2e-6, rtol=2e-6)


def test_a_beginning_that_others_computed_changes_nothing():
    whole = draw(lengths=[(50, 50)])
    rest = [whole[0][20:], *whole[1:3], torch.tensor([0, 30]), torch.tensor([0, 50])]
    assert torch.equal(ops.varlen_attention(*rest, scale=0.3), ops.varlen_attention(*whole, scale=0.3)[20:])


def test_scores_far_from_zero_and_far_apart():
    inputs = draw(lengths=[(40, 40)])
    inputs[0] *= 60
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    expected = reference.varlen_attention(*wide, scale=1.0)
    out = ops.varlen_attention(*inputs, scale=1.0)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)


def test_sequences_do_not_know_of_each_other_and_repeats_are_the_same_bits():
    inputs = draw((9, 3, 64), torch.bfloat16)
    grad = torch.randn(inputs[0].shape, generator=seeded(1)).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        out, grads = gradients(ops.varlen_attention, inputs, grad, scale=0.1)
        again, grads_again = gradients(ops.varlen_attention, inputs, grad, scale=0.1)
        assert torch.equal(out, again)
        assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
        torch.set_num_threads(1)
        for s, (m, n) in enumerate(LENGTHS):
            rows, keys = slice(inputs[3][s], inputs[3][s + 1]), slice(inputs[4][s], inputs[4][s + 1])
            one = [
                inputs[0][rows],
                inputs[1][keys],
                inputs[2][keys],
                torch.tensor([0, m]),
                torch.tensor([0, n]),
            ]
            alone, alone_grads = gradients(ops.varlen_attention, one, grad[rows], scale=0.1)
            assert torch.equal(alone, out[rows])
            for x, of_all, part in zip(alone_grads, grads, (rows, keys, keys), strict=True):
                assert torch.equal(x, of_all[part])
    finally:
        torch.set_num_threads(threads)


def test_a_sequence_of_nan_is_nan_and_its_neighbours_are_not():
    inputs = draw(lengths=[(5, 5), (4, 4), (6, 6)])
    inputs[1][5:9] = torch.nan
    out = ops.varlen_attention(*inputs, scale=0.3)
    assert out[5:9].isnan().all() and out[:5].isfinite().all() and out[9:].isfinite().all()


def test_any_strides():
    inputs = draw(dtype=torch.bfloat16)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:3]]
    width_first = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in inputs[:3]]
    grad = torch.ones_like(inputs[0])
    out, grads = gradients(ops.varlen_attention, inputs, grad, scale=0.3)
    for strided in (heads_first, width_first):
        tensors = [x.requires_grad_() for x in strided]
        other = ops.varlen_attention(*tensors, *inputs[3:], scale=0.3)
        assert torch.equal(other, out)
        # A gradient of stride 0, as a sum's is.
        other_grads = torch.autograd.grad(other.sum(), tensors)
        assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


def test_no_tokens_and_no_sequences():
    inputs = draw(lengths=[(0, 0)])
    assert ops.varlen_attention(*inputs, scale=1.0).shape == (0, 4, 8)
    none = [*inputs[:3], torch.tensor([0]), torch.tensor([0])]
    assert ops.varlen_attention(*none, scale=1.0).shape == (0, 4, 8)


def test_opcheck_and_whole_compilation():
    inputs = draw(lengths=[(3, 5), (9, 9)])
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.library.opcheck(torch.ops.fastppo.varlen_attention.default, (*inputs, 0.3, 4))
    compiled = torch.compile(
        lambda *x: ops.varlen_attention(*x, scale=0.3), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(*inputs), ops.varlen_attention(*inputs, scale=0.3))


def test_it_is_differentiable_once():
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in draw(lengths=[(3, 3)])]
    out = ops.varlen_attention(*inputs, scale=0.3)
    (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, lambda x: x.double(), "query must be float32, bfloat16 or float16, got float64"),
        (0, lambda x: x[0], r"query must have shape \(Nq, query heads, D\), got \(4, 8\)"),
        (0, lambda x: x[:, :3], "query heads must be a multiple of key heads, got 3 and 2"),
        (1, lambda x: x[..., :7], r"key must have shape \(Nk, key heads, 8\) .* got \(413, 2, 7\)"),
        (1, lambda x: x.bfloat16(), "key must be float32, got bfloat16"),
        (2, lambda x: x[:5], r"value must have shape \(413, 2, 8\) like key, got \(5, 2, 8\)"),
        (2, lambda x: x.half(), "value must be float32, got float16"),
        (3, lambda x: x.int(), "cu_seqlens_q must be int64, got int32"),
        (3, lambda x: x[None], r"cu_seqlens_q must have shape \(sequences \+ 1,\), got \(1, 10\)"),
        (4, lambda x: x[1:], r"cu_seqlens_k must have shape \(10,\) like cu_seqlens_q, got \(9,\)"),
        (3, lambda x: x + 1, "cu_seqlens_q must go from 0 to 145, got 1 and 146"),
        (4, lambda x: x.minimum(torch.tensor(300)), "cu_seqlens_k must go from 0 to 413, got 0 and 300"),
        (4, lambda x: x[[0, 2, 1, 3, 4, 5, 6, 7, 8, 9]], "cu_seqlens_k must not fall, got 6 and 1 at 1"),
        (3, lambda x: x.index_fill(0, torch.tensor([1, 2, 3, 4]), 9), "keys as queries, got 1 and 9 in sequence 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(place, value, message):
    inputs = draw()
    inputs[place] = value(inputs[place])
    with pytest.raises(ValueError, match="varlen_attention: .*" + message):
        ops.varlen_attention(*inputs, scale=0.3)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        ops.varlen_attention(*draw(), scale=float("nan"))
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        ops.varlen_attention(*draw(), scale=1.0, window=0)
