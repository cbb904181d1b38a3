"""Runs TRL 1.12's own PPOTrainer for one iteration per case, on tiny models, and writes down what it computes.

A program, for a process of its own: TRL's Accelerator would leave its state in ours.

    PYTHONPATH=<folder with TRL 1.12>:tests:. python tests/trl_recorder.py OUT

`train()` keeps everything in local variables; a callback at the end of the step reads them off its frame.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import tiny
import torch

BATCH, MICRO_BATCH = 8, 4
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": MICRO_BATCH,
    "gradient_accumulation_steps": BATCH // MICRO_BATCH,
    "total_episodes": BATCH,
    "num_ppo_epochs": 2,
    "response_length": 8,
    "temperature": 0.7,
    "kl_coef": 0.2,
    "local_rollout_forward_batch_size": BATCH,
    "num_sample_generations": 0,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
}
# What each case changes. Names that PPOConfig does not have: `prompts`, rows of the data set; `pad`, the padding token.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "k3": {"kl_estimator": "k3"},
    "discounted": {"gamma": 0.9, "lam": 0.8},
    "hot": {"temperature": 1.3},
    "whiten_rewards": {"whiten_rewards": True},
    "stop": {"stop_token": "eos", "num_ppo_epochs": 1},
    "one_micro_batch": {
        "stop_token": "eos",
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
    },
    "missing_eos_penalty": {"stop_token": "eos", "missing_eos_penalty": 1.5},
    "other_stop_token": {"stop_token_id": 253, "missing_eos_penalty": 1.5},
    "mini_batches": {"num_mini_batches": 2, "num_ppo_epochs": 1},
    "max_grad_norm": {"max_grad_norm": 1e-3},
    "bf16": {"bf16": True},
    "last_batch": {"prompts": BATCH},
    "few_prompts": {"prompts": BATCH - 1},
    "pad_is_eos": {"stop_token": "eos", "pad": "<|end|>"},
}
KEPT = (
    *(
        "queries",
        "responses",
        "padding_mask",
        "padding_mask_p1",
        "logprobs",
        "ref_logprobs",
        "values",
        "scores",
    ),
    *("kl", "rewards", "advantages", "returns", "b_inds", "metrics"),
    *("pg_loss_stats", "vf_loss_stats", "entropy_stats", "ratio_stats"),
)


def settings(case: str) -> dict[str, Any]:
    """Arguments of PPOConfig, TRL's or ours."""
    return {name: x for name, x in {**SETTINGS, **CASES[case]}.items() if name not in ("prompts", "pad")}


def tokenizer(case: str) -> Any:
    made = tiny.tokenizer(CASES[case].get("pad", "<|pad|>"))
    made.padding_side = "left"
    return made


def models() -> dict[str, Any]:
    """Policy, a reference not far from it, critic and reward model, the same at every call."""
    policy, reference = tiny.policy(), tiny.policy()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.01 * torch.randn(p.shape, generator=generator)
        for model in (policy, reference):
            model.lm_head.weight[1] *= 4  # ends now and then
    return {
        "model": policy,
        "ref_model": reference,
        "value_model": tiny.classifier(1, initializer_range=0.2),
        "reward_model": tiny.classifier(2, initializer_range=0.2),
    }


def prompts(case: str) -> list[list[int]]:
    """Token ids of different lengths; with `pad_is_eos`, a token in the middle is the EOS, as in a chat."""
    made = tokenizer(case)
    words = tiny.TEXT.split()
    texts = [" ".join(words[i : i + 1 + i % 5]) for i in range(CASES[case].get("prompts", 3 * BATCH))]
    ids: list[list[int]] = made(texts)["input_ids"]
    return [[*row[:1], made.eos_token_id, *row] for row in ids] if case == "pad_is_eos" else ids


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Without Adam's division, which would blow rounding up where a gradient is near 0."""
    return torch.optim.SGD(parameters, lr=0.05)


def record(case: str, folder: str) -> dict[str, Any]:
    """One iteration of TRL."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    found: dict[str, Any] = {}

    class Recorder(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            frame = sys._getframe()
            while frame.f_code is not PPOTrainer.train.__code__:
                assert frame.f_back is not None
                frame = frame.f_back
            for name in KEPT:
                x = frame.f_locals[name]
                found[name] = x.clone() if isinstance(x, torch.Tensor) else x

    torch.manual_seed(0)
    np.random.seed(0)  # TRL orders episodes by it, and seeds torch alone
    parts = models()
    trained = [*parts["model"].parameters(), *parts["value_model"].parameters()]
    steps = optimizer(trained)
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=folder, **settings(case)),
        processing_class=tokenizer(case),
        train_dataset=Dataset.from_dict({"input_ids": prompts(case)}),
        callbacks=[Recorder()],
        optimizers=(steps, torch.optim.lr_scheduler.LambdaLR(steps, lambda _: 1.0)),
        **parts,
    )
    found["mixed_precision"] = trainer.accelerator.mixed_precision
    found["batches"] = len(trainer.dataloader)
    if not found["batches"]:
        return found  # train() would look for the first one for ever
    grad_norms: list[float] = []

    def note_gradient(*args: Any) -> None:
        grad_norms.append(torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm().item())

    steps.register_step_pre_hook(note_gradient)
    head_dtypes = set()
    parts["model"].lm_head.register_forward_hook(lambda module, inputs, out: head_dtypes.add(out.dtype))
    trainer.train()
    found["grad_norms"], found["head_dtypes"] = grad_norms, head_dtypes
    found["weights"] = [p.detach().clone() for p in trained]
    return found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        torch.save({case: record(case, scratch) for case in CASES}, sys.argv[1])
