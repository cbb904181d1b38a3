"""The library: one instruction set computes what another does, and nothing stands in for it when missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastppo
from fastppo import ops, reference

ROOT = Path(fastppo.__file__).parent.parent
SETS = [name.lower() for name in ops._library.library.build_facts()["instruction_sets"]]
ACTIVE = ops._library.library.cpu_capability()
ORDER = ["default", "avx2", "avx512"]

# Prints one line per result, with the digits that make a float32. Rows end inside a register of every set.
SCRIPT = """
import torch
from fastppo import ops

torch.manual_seed(0)
B, T = 5, 531
mask = torch.rand(B, T) > 0.3
dtypes = (torch.float32, torch.bfloat16, torch.float16)
x = [torch.randn(B, T, dtype=dtype) for dtype in dtypes for _ in range(3)]
results = [*ops.rewards_and_advantages(torch.randn(B), *x[1:4], mask, estimator="k3", whiten_rewards=True)]
results += [ops.kl_penalty(x[0], x[6], estimator=e) for e in ops.KL_ESTIMATORS]
new_logprobs = x[3].clone().requires_grad_()
loss, stats = ops.ppo_loss(
    new_logprobs, x[0], x[1], mask,
    new_values=x[2], values=x[6], returns=x[7], entropy=x[4], ref_logprobs=x[5],
)
loss.backward()
results += [loss.detach(), *stats, new_logprobs.grad.float()]
state = [*ops.split_master(torch.randn(B, T)), torch.zeros(B, T), torch.zeros(B, T)]
ops.adamw_step_(
    *state[:2], x[8], *state[2:], lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.1, step=1
)
results += [ops.join_master(*state[:2])]
print(ops._library.library.cpu_capability())
for result in results:
    print(*(f"{v:.9g}" for v in result.flatten().tolist()))
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("chosen", SETS)
def test_every_instruction_set_computes_the_same(chosen, results_of_the_active_set):
    if ORDER.index(chosen) > ORDER.index(ACTIVE):
        pytest.skip(f"this processor runs at most {ACTIVE}")
    got = run(SCRIPT, FASTPPO_CPU_CAPABILITY=chosen)
    assert got.returncode == 0, got.stderr
    name, *lines = got.stdout.splitlines()
    assert name == chosen
    for line, expected in zip(lines, results_of_the_active_set, strict=True):
        numbers = [torch.tensor([float(v) for v in text.split()]) for text in (line, expected)]
        # Sums are grouped by register width, and only some sets fuse multiplications with additions.
        torch.testing.assert_close(*numbers, atol=5e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def results_of_the_active_set():
    got = run(SCRIPT, FASTPPO_CPU_CAPABILITY="")
    assert got.returncode == 0, got.stderr
    return got.stdout.splitlines()[1:]


def test_an_instruction_set_that_does_not_exist_is_an_error():
    got = run("from fastppo import ops", FASTPPO_CPU_CAPABILITY="sse9")
    assert got.returncode != 0
    assert "FASTPPO_CPU_CAPABILITY must be default, avx2 or avx512, got sse9" in got.stderr


def test_nothing_stands_in_for_a_missing_library():
    hide = "import sys; sys.modules['fastppo._C'] = None\n"
    got = run(hide + "from fastppo import ops")
    assert got.returncode != 0 and "the compiled library fastppo/_C is missing" in got.stderr
    got = run(hide + "from fastppo import reference; print(reference.gae.__name__)")
    assert got.stdout.strip() == "gae"


def test_every_op_has_a_twin_with_the_same_signature():
    import inspect

    for name in ops.__all__:
        op, twin = getattr(ops, name), getattr(reference, name)
        if inspect.isfunction(op):
            parameters, twins = (inspect.signature(f).parameters for f in (op, twin))
            assert list(parameters) == list(twins), name
            assert [p.default for p in parameters.values()] == [p.default for p in twins.values()], name
            assert [p.kind for p in parameters.values()] == [p.kind for p in twins.values()], name


def test_every_op_is_registered_for_the_cpu_and_documented():
    assert ops.__all__ == sorted(ops.__all__)
    for name in ops.__all__:
        assert getattr(ops, name).__doc__, name
    for name in (
        "gae",
        "whiten",
        "scale_to_unit_std",
        "rewards_and_advantages",
        "kl_penalty",
        "ppo_loss",
        "adamw_step_",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastppo::{name}", "CPU"), name
