"""AdamW that keeps a float32 master of bfloat16 weights in two bytes more per weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from . import ops

WITH_MASTER = ("adamw_torch", "adamw_torch_fused")
_STOCHASTIC_ROUNDING = ("adamw_torch_8bit", "adamw_torch_4bit")  # torchao's, if asked to


def check_optim(optim: str, optim_args: str | None, *, bfloat16: bool) -> None:
    """Refuse the optimizers that transformers knows by name and that would silently train wrongly here.

    Args:
        optim: `TrainingArguments.optim`.
        optim_args: `TrainingArguments.optim_args`.
        bfloat16: are there trainable bfloat16 weights?

    Raises:
        ValueError: it is one of them; the message says why, and what to do instead.
    """
    if optim.endswith("_layerwise") or optim in ("lomo", "adalomo"):
        raise ValueError(
            f"optim={optim!r} changes weights inside the backward pass, before the gradients of all micro-batches are "
            "there and clipped, and before target_kl or ratio_threshold can refuse the step; use another optimizer"
        )
    if optim.startswith("schedule_free"):
        raise ValueError(
            f"optim={optim!r} trains at other weights than those it is evaluated with, so the policy that is updated "
            "would not be the one that made the rollout; use another optimizer"
        )
    if not bfloat16 or optim in WITH_MASTER:
        return
    rounded_by_chance = "bf16_stochastic_round=true" in (optim_args or "").replace(" ", "").lower()
    if optim in _STOCHASTIC_ROUNDING and rounded_by_chance:
        return
    raise ValueError(
        f"optim={optim!r} updates bfloat16 weights without a float32 master, and at PPO's learning rates nearly every "
        "step rounds to nothing. Leave optim at adamw_torch, which keeps one (10 bytes a weight with its gradient); "
        "set bf16=False (an 8-bit optimizer on float32 weights takes 10 as well); train an adapter, whose weights are "
        "float32; or use optim='adamw_torch_8bit' with optim_args='bf16_stochastic_round=True' (6 bytes)"
    )


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) for float32 and bfloat16 parameters.

    A bfloat16 weight has a float32 master: the weight holds its upper 16 bits and a `residual` the rest, so small
    updates add up instead of being rounded away, and a weight takes 2 + 2 bytes rather than 2 + 4. Its moments are
    kept in bfloat16, rounded by chance so that their means are exact (see `ops.adamw_step_`). Together 8 bytes a
    weight and 2 of gradient, where float32 AdamW takes 16.
    Float32 parameters get torch's own fused AdamW.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, per step and unit of learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def keep_residuals(self, residuals: Mapping[Tensor, Tensor]) -> None:
        """Let the masters begin at the float32 weights that were cast, not at what the cast left of them.

        Args:
            residuals: what the cast took off each weight, as `models.to_bfloat16` gives it. Without it a
                master begins at the bfloat16 weight.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p in residuals:
                    self.state[p]["residual"] = residuals[p].to(p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step. `closure` reevaluates the loss, as in every torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            plain: list[Tensor] = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.dtype is not torch.bfloat16:
                    plain.append(p)
                    continue
                state = self.state[p]
                if "step" not in state:
                    state["step"] = 0
                    if "residual" not in state:
                        state["residual"] = torch.zeros_like(p, dtype=torch.int16)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                ops.adamw_step_(
                    p,
                    state["residual"],
                    p.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    lr=float(group["lr"]),
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=state["step"],
                )
            self._plain_step(plain, group)
        return loss

    def _plain_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every torch optimizer, but state keeps the dtype it was saved with: torch would cast the residual to
        bfloat16 and lose the master.
        """
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(device=p.device, copy=True)
