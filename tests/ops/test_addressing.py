"""Rows that lie more than 2^31 elements apart: every backend computes addresses in 64 bits."""

import pytest
import torch
from backends import seeded

from fastppo import ops

APART = 2**31 + 5  # elements; odd, so that the rows are aligned differently too
VOCABULARY = 4099


def far_apart(x):
    """Copy two rows into memory of which only they are ever touched: 4 GB of addresses, a few pages of memory."""
    room = torch.empty(APART + x.shape[1], dtype=x.dtype)
    rows = room.as_strided(x.shape, (APART, 1))
    rows.copy_(x)
    return rows


def example(seed, columns=VOCABULARY, dtype=torch.bfloat16):
    return (torch.randn(2, columns, generator=seeded(seed)) * 3).to(dtype)


def gradient(call, x):
    x = x.detach().requires_grad_()
    results = call(x)
    sum(r.sum() for r in results).backward()
    return *(r.detach() for r in results), x.grad


IDS = [VOCABULARY - 1, 7]
CALLS = {
    "sample": lambda x: ops.sample(x, seed=1, counters=torch.arange(2)),
    "sample, truncated": lambda x: ops.sample(x, top_k=50, top_p=0.9, seed=1, counters=torch.arange(2)),
    "logprobs": lambda x: gradient(lambda x: ops.logprobs(x, torch.tensor(IDS)), x),
    "distribution_kl": lambda x: gradient(lambda x: (ops.distribution_kl(x, x.detach() / 2),), x),
    "linear_logprobs": lambda x: gradient(
        lambda x: ops.linear_logprobs(x, example(2, VOCABULARY)[:1].expand(9, -1), torch.tensor([8, 0])), x
    ),
    "ppo_loss_from_logits": lambda x: gradient(
        lambda x: ops.ppo_loss_from_logits(
            x, torch.tensor(IDS), torch.full((2,), -5.0), torch.ones(2), torch.ones(2, dtype=torch.bool)
        )[:1],
        x,
    ),
    "kl_penalty": lambda x: (ops.kl_penalty(x, x.flip(0)),),
    "gae": lambda x: ops.gae(x.flip(1), x, torch.ones_like(x, dtype=torch.bool)),
    "whiten": lambda x: (ops.whiten(x, torch.ones_like(x, dtype=torch.bool)),),
    "ppo_loss": lambda x: gradient(
        lambda x: ops.ppo_loss(x, x.detach() + 0.1, x.detach(), torch.ones_like(x, dtype=torch.bool))[:1], x
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_rows_beyond_32_bits_are_rows_like_any_other(name):
    x = example(1)
    for got, expected in zip(CALLS[name](far_apart(x)), CALLS[name](x), strict=True):
        torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)
