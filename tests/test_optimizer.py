"""AdamW: bfloat16 weights learn what float32 weights learn, and a saved state is the whole state."""

from __future__ import annotations

import torch

from fastppo.optimizer import AdamW
from fastppo.reference.adamw import join_master


def train(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, steps: int, start: int = 0) -> None:
    for i in range(start, start + steps):
        p.grad = (
            torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16).to(p.dtype)
        )
        optimizer.step()


def parameter(dtype: torch.dtype) -> torch.nn.Parameter:
    start = torch.randn(37, 53, generator=torch.Generator().manual_seed(99)).to(torch.bfloat16)
    return torch.nn.Parameter(start.to(dtype))


def test_small_steps_add_up_in_bfloat16() -> None:
    half, full, rounded = parameter(torch.bfloat16), parameter(torch.float32), parameter(torch.bfloat16)
    start = full.detach().clone()
    ours = AdamW([half], lr=1e-5, weight_decay=0.01)
    train(ours, half, 100)
    train(torch.optim.AdamW([full], lr=1e-5, weight_decay=0.01), full, 100)
    train(torch.optim.AdamW([rounded], lr=1e-5, weight_decay=0.01), rounded, 100)
    master = join_master(half.detach(), ours.state[half]["residual"])
    moved = (full.detach() - start).norm()
    # exp_avg in bfloat16 rounds each step's direction by up to 2**-9; gradients of pure noise make that show most.
    assert (master - full.detach()).norm() < 0.03 * moved
    assert torch.equal(master.to(torch.bfloat16), half.detach())
    # Without a master nearly all of the movement is rounded away.
    assert (rounded.detach().float() - full.detach()).norm() > 0.5 * moved


def test_float32_parameters_get_torchs_own_adamw() -> None:
    ours_p, theirs_p = parameter(torch.float32), parameter(torch.float32)
    ours, theirs = (
        AdamW([ours_p], lr=1e-3),
        torch.optim.AdamW([theirs_p], lr=1e-3, weight_decay=0.0, fused=True),
    )
    train(ours, ours_p, 5)
    train(theirs, theirs_p, 5)
    assert torch.equal(ours_p, theirs_p)


def test_state_dict_brings_back_every_bit() -> None:
    straight, stopped = parameter(torch.bfloat16), parameter(torch.bfloat16)
    a, b = AdamW([straight], lr=1e-4), AdamW([stopped], lr=1e-4)
    train(a, straight, 10)
    train(b, stopped, 5)
    resumed = torch.nn.Parameter(stopped.detach().clone())
    c = AdamW([resumed], lr=1.0)
    c.load_state_dict(b.state_dict())
    train(c, resumed, 5, start=5)
    assert torch.equal(straight, resumed)
    for name in ("residual", "exp_avg", "exp_avg_sq"):
        assert torch.equal(a.state[straight][name], c.state[resumed][name])
        assert a.state[straight][name].dtype == c.state[resumed][name].dtype
