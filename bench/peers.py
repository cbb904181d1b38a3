"""What others offer for the same jobs: TRL's functions and Hugging Face's logits processors.

TRL comes by pip at run time, one folder per version, and is imported under a name that holds the version
(``trl_1_12_0``), so two versions can be measured in one process and the environment stays as it is. What
`PPOTrainer.train` of TRL 1.12 computes inline is cut out of its source as installed: the statements are found by the
names they assign and compiled into a function, so TRL's own code is what runs. When a peer cannot be loaded or cut,
the run fails.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
CHUNKED, PPO = "1.16.0", "1.12.0"  # the newest TRL, and the last one with PPO

# Settings of TRL's PPO, under its names: its defaults.
ARGS = SimpleNamespace(
    kl_coef=0.05,
    kl_estimator="k1",
    whiten_rewards=False,
    gamma=1.0,
    lam=0.95,
    cliprange=0.2,
    cliprange_value=0.2,
    vf_coef=0.1,
)


def fetch_trl(version: str) -> Path:
    """Folder with this TRL alone, without what it depends on: the environment stays as it is."""
    folder = ROOT / ".cache" / f"trl-{version}"
    if not (folder / "trl").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, f"trl=={version}"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"the benchmark compares with TRL {version}, which pip could not install: {done.stderr}"
            )
    return folder


def trl(version: str, module: str) -> Any:
    """Module `module` of that TRL version, such as ``trainer.utils``."""
    package = "trl_" + version.replace(".", "_")
    if package not in sys.modules:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        folder = fetch_trl(version) / "trl"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec and spec.loader
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{module}")


# TRL 1.16


def trl_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`selective_log_softmax` and `entropy_from_logits`; they loop over a batch, so rows come as replies of 64."""
    utils = trl(CHUNKED, "trainer.utils")
    batch = -(-len(ids) // 64) if len(ids) % 64 == 0 else 1
    shaped = logits.view(batch, -1, logits.shape[-1])
    logprobs = utils.selective_log_softmax(shaped, ids.view(batch, -1))
    return logprobs.flatten(), utils.entropy_from_logits(shaped).flatten()


def trl_linear_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`ChunkedLogProbFunction` with the chunk that TRL's trainers use."""
    chunk = trl(CHUNKED, "trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    function = trl(CHUNKED, "kernels").ChunkedLogProbFunction
    logprobs, entropy, *_ = function.apply(hidden, weight, None, ids, 1.0, chunk, None, 1.0, ("entropy",))
    return logprobs, entropy


# TRL 1.12: statements of PPOTrainer.train


def trl_gae() -> Callable[..., tuple[Tensor, Tensor]]:
    """(rewards, values, padding mask) -> (advantages, returns), not yet whitened."""
    loop = from_train(
        first="lastgaelam",
        last="returns",
        inputs=("rewards", "values", "responses", "args"),
        outputs=("advantages", "returns"),
    )
    return lambda rewards, values, mask: loop(rewards, values, rewards, ARGS)


def trl_rewards_and_advantages() -> Callable[..., tuple[Tensor, ...]]:
    """Arguments and results of `rewards_and_advantages`, from the length of each reply on."""
    statements = from_train(
        first="response_idxs",
        last="advantages",
        inputs=("responses", "sequence_lengths", "logprobs", "ref_logprobs", "scores", "values", "args"),
        outputs=("rewards", "kl", "advantages", "returns"),
    )

    def run(
        scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = statements(
            logprobs, mask.sum(1) - 1, logprobs, ref_logprobs, scores, values, ARGS
        )
        return results

    return run


def trl_kl() -> Callable[[Tensor, Tensor], Tensor]:
    """(logprobs, ref_logprobs) -> k3."""
    statements = from_train(
        first="logr", last="kl", inputs=("logprobs", "ref_logprobs", "args"), outputs=("kl",)
    )
    k3 = SimpleNamespace(kl_estimator="k3")
    return lambda logprobs, ref_logprobs: statements(logprobs, ref_logprobs, k3)[0]


def trl_whiten() -> Callable[[Tensor, Tensor], Tensor]:
    """`masked_whiten` and the mask after it, as `train` calls them."""
    whiten = trl(PPO, "experimental.ppo.ppo_trainer").masked_whiten
    return lambda x, mask: torch.masked_fill(whiten(x, mask), ~mask, 0)


def trl_ppo_loss() -> Callable[..., tuple[Tensor, ...]]:
    """(new_logprobs, new_values, logprobs, values, advantages, returns, mask) -> loss and TRL's metrics of it."""
    statements = from_train(
        first="vpredclipped",
        last="approxkl",
        only=(
            *("vpredclipped", "vf_losses1", "vf_losses2", "vf_loss_max", "vf_loss", "vf_clipfrac"),
            *("logprobs_diff", "ratio", "pg_losses", "pg_losses2", "pg_loss_max", "pg_loss", "loss"),
            *("pg_clipfrac", "approxkl"),
        ),
        inputs=(
            *("new_logprobs", "vpred", "mb_logprobs", "mb_values", "mb_advantage", "mb_return"),
            *("padding_mask", "padding_mask_p1", "micro_batch_inds", "args"),
        ),
        outputs=("loss", "pg_loss", "vf_loss", "approxkl", "pg_clipfrac", "vf_clipfrac", "ratio"),
    )

    def run(
        new_logprobs: Tensor,
        new_values: Tensor,
        logprobs: Tensor,
        values: Tensor,
        advantages: Tensor,
        returns: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, ...]:
        padding = ~mask
        *metrics, ratio = statements(
            *(new_logprobs, new_values, logprobs, values, advantages, returns, padding, padding),
            *(slice(None), ARGS),
        )
        return (*metrics, ratio.mean().detach())

    return run


def from_train(
    first: str,
    last: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    only: Sequence[str] | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """Statements of TRL 1.12's `PPOTrainer.train`, from the first assignment to `first` to the last one to `last`.

    `only`: leave out statements that assign anything but these. The statements are looked for in one block, and in
    the blocks nested in it (a ``with torch.no_grad()`` stays around what it holds).
    """
    module = trl(PPO, "experimental.ppo.ppo_trainer")
    train = ast.parse(textwrap.dedent(inspect.getsource(module.PPOTrainer.train))).body[0]
    return cut(train, vars(module), first, last, inputs, outputs, only)


def cut(
    function: ast.AST,
    names: dict[str, Any],
    first: str,
    last: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    only: Sequence[str] | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """Compile a run of statements of `function` into a function of its own, with `names` as its globals."""
    for block in blocks(function):
        starts = [i for i, one in enumerate(block) if first in assigned(one)]
        ends = [i for i, one in enumerate(block) if last in assigned(one)]
        if starts and ends:
            body = block[starts[0] : ends[-1] + 1]
            break
    else:
        raise RuntimeError(
            f"TRL {PPO}: no block of PPOTrainer.train assigns both `{first}` and `{last}`; "
            "the benchmark's peer cannot be built"
        )
    if only is not None:
        body = [one for one in (kept(one, set(only)) for one in body) if one is not None]
    found = {name for one in body for name in assigned(one)}
    missing = (set(outputs) | set(only or ())) - found
    if missing:
        raise RuntimeError(f"TRL {PPO}: PPOTrainer.train no longer assigns {', '.join(sorted(missing))}")
    source = f"def statements({', '.join(inputs)}):\n    return ({', '.join(outputs)},)"
    tree = ast.parse(source)
    made = tree.body[0]
    assert isinstance(made, ast.FunctionDef)
    made.body[:0] = body
    space = dict(names)
    exec(compile(ast.fix_missing_locations(tree), f"<TRL {PPO}: {first} to {last}>", "exec"), space)
    result: Callable[..., tuple[Any, ...]] = space["statements"]
    return result


def blocks(node: ast.AST) -> list[list[ast.stmt]]:
    """Every list of statements below `node`, innermost first."""
    found = []
    for child in ast.walk(node):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(child, name, None)
            if isinstance(block, list) and block:
                found.append(block)
    return found[::-1]


def assigned(statement: ast.AST) -> set[str]:
    """Names that a statement binds, in itself or in a block of it."""
    return {x.id for x in ast.walk(statement) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}


def kept(statement: ast.stmt, names: set[str]) -> ast.stmt | None:
    """The statement if it binds some of `names`, a `with` cut down to those of its statements that do, or None."""
    if isinstance(statement, ast.With):
        body = [one for one in (kept(inner, names) for inner in statement.body) if one is not None]
        return ast.With(items=statement.items, body=body) if body else None
    return statement if assigned(statement) & names and assigned(statement) <= names else None


# Hugging Face


def hf_sample(
    temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, logprobs: bool = False
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """`generate`'s own way to the next token: processors, softmax, multinomial.

    `logprobs`: also both log-probs and the entropy of each draw, which PPO needs.
    """
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    no_ids: Any = None  # of the prompt; these processors do not look at it
    policy = TemperatureLogitsWarper(temperature)
    warpers = LogitsProcessorList([policy])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))

    def run(logits: Tensor, counters: Tensor) -> tuple[Tensor, ...]:
        scores = warpers(no_ids, logits.to(torch.float32, copy=True))
        ids = torch.multinomial(scores.softmax(-1), num_samples=1)
        if not logprobs:
            return (ids.squeeze(1),)
        before = policy(no_ids, logits.float()).log_softmax(-1)
        after = before if scores.shape == before.shape and len(warpers) == 1 else scores.log_softmax(-1)
        entropy = torch.special.entr(before.exp()).sum(-1)
        return ids.squeeze(1), before.gather(1, ids)[:, 0], after.gather(1, ids)[:, 0], entropy

    return run
