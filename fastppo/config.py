"""Settings of a PPO run.

`PPOConfig` has the fields and defaults of TRL's `PPOConfig` (0.13 to 1.12, `trl.experimental.ppo`), so that a script
written for it runs unchanged. Settings that TRL's PPO never had use the name that TRL's GRPO gives them. Every field
is checked once, here; the rooms unpack the settings and hand plain numbers to the ops.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from .objective import AGGREGATIONS, Objective

KL_ESTIMATORS = ("k1", "abs", "k2", "k3", "full")
OLD_LOGPROBS = ("recompute", "rollout")
# In the loss only those whose gradient lowers the KL: k1's has mean 0, and that of abs is blind to how far it is.
KL_LOSS_ESTIMATORS = ("k2", "k3")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def multiplies_bfloat16(use_cpu: bool = False) -> bool:
    """Does the device that would be trained on have instructions for products of bfloat16 numbers?

    Without them (x86 processors without AVX-512, GPUs before Ampere) such products are emulated, and slower than those
    of float32.
    """
    if torch.accelerator.is_available() and not use_cpu:
        is_cuda = torch.accelerator.current_accelerator() == torch.device("cuda")
        return not is_cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and supported()


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of `fastppo.PPOTrainer`: `transformers.TrainingArguments` plus the fields below.

    An *episode* is one response to one prompt. An *update* is one pass of rollout, score, advantages and
    `num_ppo_epochs` epochs over `batch_size` episodes, where
    `batch_size = per_device_train_batch_size * gradient_accumulation_steps * world_size`.

    Fields that differ from `TrainingArguments`: `learning_rate=3e-6`, `logging_steps=10`,
    `gradient_checkpointing=True`, `bf16=True` where the device multiplies bfloat16. With `bf16` the weights are
    bfloat16 and the optimizer keeps their float32 master (see `fastppo.optimizer.AdamW`), so no update is lost to
    rounding.
    Metrics are logged after every update.

    Raises:
        ValueError: a setting is out of its range; the message names it, what is allowed and what came.
    """

    # --- TrainingArguments with the defaults of TRL's trainers
    learning_rate: float = _setting(3e-6, "Initial learning rate of AdamW.")
    logging_steps: float = _setting(10, "Kept for compatibility: metrics are logged after every update.")
    gradient_checkpointing: bool = _setting(
        True, "Recompute activations in the backward pass: less memory for about a third more time."
    )
    bf16: bool | None = _setting(  # type: ignore[assignment]
        None, "bfloat16 weights with a float32 master. Default: where the device multiplies bfloat16."
    )

    # --- TRL's PPOConfig
    dataset_num_proc: int | None = _setting(
        None, "Kept for compatibility: prompts are tokenised as they are read."
    )
    num_mini_batches: int = _setting(1, "Optimizer steps per epoch over a batch.")
    total_episodes: int | None = _setting(
        None, "Episodes to train for. Default: num_train_epochs * len(dataset)."
    )
    local_rollout_forward_batch_size: int = _setting(
        64, "Episodes generated or scored in one forward pass, per rank."
    )
    num_sample_generations: int = _setting(
        10, "How often in a run a table of sample completions is made; 0: never."
    )
    response_length: int = _setting(
        53, "Most tokens in a response, the stop token included; with an environment, in one turn."
    )
    stop_token: str | None = _setting(None, "'eos' or None; both stop at the tokenizer's and model's EOS.")
    stop_token_id: int | None = _setting(None, "Stop at this token instead of EOS.")
    temperature: float = _setting(0.7, "Divides the logits, in sampling and in every log-prob.")
    missing_eos_penalty: float | None = _setting(
        None, "Taken off the score of a response that did not stop by itself."
    )
    sft_model_path: str = _setting("EleutherAI/pythia-160m", "Path of the SFT model, for scripts.")
    num_total_batches: int | None = _setting(None, "Computed: updates in the run.")
    micro_batch_size: int | None = _setting(None, "Computed: per_device_train_batch_size * world_size.")
    local_batch_size: int | None = _setting(None, "Computed: episodes per update and rank.")
    batch_size: int | None = _setting(None, "Computed: episodes per update.")
    local_mini_batch_size: int | None = _setting(None, "Computed: episodes per optimizer step and rank.")
    mini_batch_size: int | None = _setting(None, "Computed: episodes per optimizer step.")
    push_to_hub: bool = _setting(False, "Push the model to the Hub after training.")
    reward_model_path: str = _setting("EleutherAI/pythia-160m", "Path of the reward model, for scripts.")
    model_adapter_name: str | None = _setting(
        None, "PEFT adapter that is trained, where a model has several."
    )
    ref_adapter_name: str | None = _setting(
        None, "PEFT adapter that is the reference, where a model has several."
    )
    num_ppo_epochs: int = _setting(4, "Epochs over each batch of episodes.")
    whiten_rewards: bool = _setting(
        False, "Scale per-token rewards to unit standard deviation, keeping their mean."
    )
    kl_coef: float = _setting(0.05, "Weight of the per-token KL penalty in the reward, per nat.")
    kl_estimator: str = _setting(
        "k1", "KL estimator in the reward: k1, abs, k2, k3, or full, the exact KL over the vocabulary."
    )
    cliprange: float = _setting(0.2, "Clip range of the probability ratio.")
    vf_coef: float = _setting(0.1, "Weight of the value loss.")
    cliprange_value: float = _setting(0.2, "Clip range of the value around its old estimate.")
    gamma: float = _setting(1.0, "Discount factor per token.")
    lam: float = _setting(0.95, "Lambda of generalized advantage estimation.")
    ds3_gather_for_generation: bool = _setting(True, "Gather ZeRO-3 weights once for generation.")

    # --- fastppo (names as in TRL's GRPO where it has them)
    top_k: int = _setting(0, "Sample among the k likeliest tokens; 0: all.")
    top_p: float = _setting(1.0, "Sample among the likeliest tokens that hold this probability; 1: all.")
    min_p: float | None = _setting(
        None, "Sample among tokens at least this likely relative to the likeliest."
    )
    repetition_penalty: float = _setting(1.0, "Above 1 discourages tokens already in the prompt or response.")
    min_new_tokens: int = _setting(0, "No stop token before this many response tokens.")
    stop_strings: list[str] | None = _setting(None, "Strings that end a response, besides the stop tokens.")
    max_turns: int = _setting(8, "With an environment: most turns of the policy in a dialogue.")
    max_length: int | None = _setting(
        None,
        "With an environment: most tokens of a dialogue, prompt included; it ends before a turn that might not fit. "
        "Default: the model's context.",
    )
    environment_timeout: float | None = _setting(
        None, "Seconds the environments of a batch may take to answer a turn. Default: no limit."
    )
    num_generations: int = _setting(1, "Responses per prompt; must divide the local batch size.")
    max_prompt_length: int | None = _setting(
        None, "Keep the last tokens of a longer prompt. Default: raise an error."
    )
    reward_weights: list[float] | None = _setting(None, "Weights of several rewards. Default: 1 each.")
    reward_clip: float | None = _setting(
        None, "Clip scores (of a dialogue: of each turn and of the end) to plus or minus this."
    )
    reward_timeout: float | None = _setting(
        None, "Seconds a reward function may take for a batch. Default: no limit."
    )
    whiten_advantages: bool = _setting(
        True, "Advantages to zero mean and unit variance over the batch of all ranks."
    )
    target_kl: float | None = _setting(
        None, "Stop the epochs of an update once approx_kl of a step exceeds this."
    )
    micro_batch_tokens: int | None = _setting(
        None,
        "Tokens (padding included) per forward and backward. Default: per_device_train_batch_size episodes, or without "
        "padding as many tokens as that many of the longest take.",
    )
    cuda_graphs: bool = _setting(
        False, "On CUDA: replay a graph of the rollout's decode step instead of launching every kernel anew."
    )
    padding_free: bool | None = _setting(
        None,
        "Pack episodes without padding, common beginnings once. Default: where the models' attention allows.",
    )

    offload_ref_model: bool = _setting(
        False, "Keep the reference in host memory; it visits the device for each scoring."
    )
    offload_reward_model: bool = _setting(
        False, "Keep reward classifiers in host memory; each visits the device for its scores."
    )

    # --- variants of the algorithm, each off by default: docs/algorithm-options.md says when to use which
    epsilon_high: float | None = _setting(
        None, "Clip range of the ratio above 1 (clip-higher). Default: cliprange."
    )
    delta: float | None = _setting(
        None,
        "Dual clip: where the advantage A is negative, the loss is at most -delta * A. Default: no bound.",
    )
    entropy_coef: float = _setting(0.0, "Weight of the entropy bonus in the loss; with adaptation, at first.")
    use_adaptive_entropy: bool = _setting(
        False, "Raise entropy_coef while the entropy is at most entropy_target, lower it otherwise."
    )
    entropy_target: float = _setting(0.2, "Entropy per token, in nats, that adaptation holds up.")
    entropy_coef_min: float = _setting(0.0, "Least entropy_coef of adaptation.")
    entropy_coef_max: float = _setting(1.0, "Largest entropy_coef of adaptation.")
    entropy_coef_delta: float = _setting(0.005, "Step of entropy_coef per update, in adaptation.")
    beta: float = _setting(
        0.0, "Weight of a KL term in the loss, beside or instead of kl_coef's in the reward."
    )
    kl_loss_estimator: str = _setting("k3", "KL estimator in the loss: k2 or k3.")
    adap_kl_ctrl: bool = _setting(False, "Adapt kl_coef so that the KL per episode nears target.")
    target: float = _setting(6.0, "KL per episode, in nats, that adap_kl_ctrl aims at.")
    horizon: float = _setting(10000.0, "Episodes in which adap_kl_ctrl moves kl_coef by at most 20 %.")
    use_score_scaling: bool = _setting(
        False, "Divide scores by their running standard deviation over all episodes so far."
    )
    use_score_norm: bool = _setting(False, "With use_score_scaling: subtract the running mean first.")
    mask_truncated_completions: bool = _setting(
        False, "Neither policy nor critic learns from responses that the length limit cut."
    )
    lam_critic: float | None = _setting(None, "Lambda of the critic's returns. Default: lam.")
    critic_warmup_updates: int = _setting(0, "First updates, in which only the critic is trained.")
    importance_sampling_correction: bool = _setting(
        False,
        "Weigh the policy gradient with p_trained / p_sampled, by which generation and training path differ.",
    )
    importance_sampling_cap: float = _setting(3.0, "Largest such weight.")
    ratio_threshold: float | None = _setting(
        None, "Skip, with a warning, optimizer steps whose mean ratio exceeds this."
    )
    ptx_coef: float = _setting(0.0, "Weight of a supervised loss on ptx_dataset in every optimizer step.")
    ptx_batch_size: int | None = _setting(
        None, "Rows of ptx_dataset per optimizer step and rank. Default: as many as episodes."
    )
    ptx_max_length: int = _setting(512, "Keep the first tokens of longer rows of ptx_dataset.")
    ema_decay: float | None = _setting(
        None, "Keep an exponential moving average of the policy that forgets this slowly, per update."
    )
    sync_ref_model: bool = _setting(False, "Move the reference towards the policy now and then.")
    ref_model_mixup_alpha: float = _setting(0.6, "Share of the policy in the moved reference.")
    ref_model_sync_steps: int = _setting(512, "Updates from one move of the reference to the next.")
    old_logprobs: str = _setting(
        "recompute",
        "The ratio's old log-probs: recompute on the path that training takes, or rollout, as they were sampled.",
    )
    reuse_scoring_forward: bool = _setting(
        False,
        "The first optimizer step goes backward through the scoring's forward of policy and critic: one forward of "
        "each less per update, and the activations of the whole batch in memory at once.",
    )
    loss_aggregation: str = _setting(
        "token", "What the loss is a mean over: token, sequence (episodes), or constant (response_length)."
    )

    def __post_init__(self) -> None:
        multiplied = multiplies_bfloat16(self.use_cpu)
        if self.bf16 is None:
            self.bf16 = multiplied and not self.fp16
        elif self.bf16 and not multiplied:
            warnings.warn(
                "PPOConfig: bf16=True on a device that has no instructions for bfloat16 products: they are emulated, "
                "and an update takes many times as long as with bf16=False, the default here",
                stacklevel=3,
            )
        # transformers 5.2x renamed the setting and warns about the name that scripts use.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        # transformers refuses bf16 without a GPU unless the CPU is asked for by name.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
        # bfloat16 is reached by casting the weights, not by autocast, which would cast them in every forward.
        self.mixed_precision = "no"
        self._check()

    def _check(self) -> None:
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"PPOConfig: {name} must be {expected}, got {getattr(self, name)!r}")

        def is_number(x: Any) -> bool:
            return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)

        def is_count(x: Any) -> bool:
            return isinstance(x, int) and not isinstance(x, bool) and x >= 1

        for name in (
            "num_mini_batches",
            "local_rollout_forward_batch_size",
            "response_length",
            "num_ppo_epochs",
            "max_turns",
            "num_generations",
            "ref_model_sync_steps",
        ):
            require(is_count(getattr(self, name)), name, "an integer of at least 1")
        for name in (
            "total_episodes",
            "max_length",
            "max_prompt_length",
            "micro_batch_tokens",
            "ptx_batch_size",
        ):
            require(
                getattr(self, name) is None or is_count(getattr(self, name)), name, "None or an integer >= 1"
            )
        for name in ("top_k", "min_new_tokens", "num_sample_generations", "critic_warmup_updates"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 0, name, "an integer of at least 0")
        for name in (
            "temperature",
            "repetition_penalty",
            "cliprange",
            "cliprange_value",
            "target",
            "horizon",
            "importance_sampling_cap",
        ):
            require(is_number(getattr(self, name)) and getattr(self, name) > 0, name, "a number above 0")
        for name in (
            "vf_coef",
            "kl_coef",
            "beta",
            "ptx_coef",
            "entropy_coef",
            "entropy_target",
            "entropy_coef_min",
            "entropy_coef_max",
            "entropy_coef_delta",
        ):
            require(
                is_number(getattr(self, name)) and getattr(self, name) >= 0, name, "a number of at least 0"
            )
        for name in ("gamma", "lam", "ref_model_mixup_alpha"):
            require(is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1, name, "in [0, 1]")
        require(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        for name in ("min_p", "lam_critic"):
            value = getattr(self, name)
            require(value is None or (is_number(value) and 0 <= value <= 1), name, "None or in [0, 1]")
        for name in (
            "missing_eos_penalty",
            "reward_clip",
            "reward_timeout",
            "environment_timeout",
            "target_kl",
            "epsilon_high",
        ):
            value = getattr(self, name)
            require(value is None or (is_number(value) and value > 0), name, "None or a number above 0")
        require(
            is_count(self.ptx_max_length) and self.ptx_max_length >= 2,
            "ptx_max_length",
            "an integer of at least 2",
        )
        for name in (
            "use_adaptive_entropy",
            "adap_kl_ctrl",
            "use_score_scaling",
            "use_score_norm",
            "mask_truncated_completions",
            "importance_sampling_correction",
            "sync_ref_model",
            "offload_ref_model",
            "offload_reward_model",
            "reuse_scoring_forward",
            "cuda_graphs",
        ):
            require(isinstance(getattr(self, name), bool), name, "True or False")
        require(self.kl_estimator in KL_ESTIMATORS, "kl_estimator", f"one of {', '.join(KL_ESTIMATORS)}")
        require(
            self.kl_loss_estimator in KL_LOSS_ESTIMATORS,
            "kl_loss_estimator",
            f"one of {', '.join(KL_LOSS_ESTIMATORS)}",
        )
        require(
            self.loss_aggregation in AGGREGATIONS, "loss_aggregation", f"one of {', '.join(AGGREGATIONS)}"
        )
        require(self.old_logprobs in OLD_LOGPROBS, "old_logprobs", f"one of {', '.join(OLD_LOGPROBS)}")
        if self.old_logprobs == "rollout":
            self._check_rollout_logprobs()
        if self.cuda_graphs and self.use_cpu:
            raise ValueError("PPOConfig: cuda_graphs needs a CUDA device, got use_cpu=True")
        if self.reuse_scoring_forward and self.num_mini_batches != 1:
            raise ValueError(
                "PPOConfig: reuse_scoring_forward needs num_mini_batches=1, got "
                f"{self.num_mini_batches}: the second step of an epoch finds other weights than those that scored"
            )
        highest_ratio = 1 + (self.cliprange if self.epsilon_high is None else self.epsilon_high)
        for name, least, why in (
            ("delta", highest_ratio, f"1 + the clip range ({highest_ratio})"),
            ("ratio_threshold", 1, "1, the ratio of an unchanged policy"),
        ):
            value = getattr(self, name)
            require(
                value is None or (is_number(value) and value > least), name, f"None or a number above {why}"
            )
        require(
            self.ema_decay is None or (is_number(self.ema_decay) and 0 < self.ema_decay < 1),
            "ema_decay",
            "None or in (0, 1)",
        )
        require(
            self.entropy_coef_min <= self.entropy_coef_max,
            "entropy_coef_min",
            f"<= entropy_coef_max ({self.entropy_coef_max})",
        )
        if self.use_adaptive_entropy:
            require(
                self.entropy_coef_min <= self.entropy_coef <= self.entropy_coef_max,
                "entropy_coef",
                f"in [entropy_coef_min, entropy_coef_max] = [{self.entropy_coef_min}, {self.entropy_coef_max}]",
            )
        if self.adap_kl_ctrl and self.kl_coef == 0:
            raise ValueError(
                "PPOConfig: adap_kl_ctrl multiplies kl_coef, which must be above 0 to begin with"
            )
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError("PPOConfig: use_score_norm needs use_score_scaling=True, as in classic TRL")
        require(self.stop_token in (None, "eos"), "stop_token", "None or 'eos'")
        require(
            self.stop_token_id is None or (isinstance(self.stop_token_id, int) and self.stop_token_id >= 0),
            "stop_token_id",
            "None or a token id",
        )
        require(
            self.stop_strings is None
            or (
                isinstance(self.stop_strings, list)
                and all(isinstance(s, str) and s for s in self.stop_strings)
            ),
            "stop_strings",
            "None or a list of non-empty strings",
        )
        require(
            self.reward_weights is None or all(is_number(w) for w in self.reward_weights),
            "reward_weights",
            "None or a list of finite numbers",
        )
        require(
            self.min_new_tokens <= self.response_length,
            "min_new_tokens",
            f"<= response_length ({self.response_length})",
        )
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("PPOConfig: set stop_token or stop_token_id, not both")
        if self.fp16:
            raise ValueError(
                "PPOConfig: fp16 is not supported (float16 gradients overflow without loss scaling); "
                "use bf16=True, or bf16=False for float32"
            )

    def _check_rollout_logprobs(self) -> None:
        """The rollout's log-probs are of logits that went through logits processors, which training does not apply."""
        for name, off in (("repetition_penalty", 1), ("min_new_tokens", 0)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"PPOConfig: old_logprobs='rollout' needs {name}={off}, got {getattr(self, name)!r}: it changes "
                    "the logits that are sampled from, and the ratio would compare two different distributions; "
                    "use old_logprobs='recompute'"
                )
        if self.importance_sampling_correction:
            raise ValueError(
                "PPOConfig: importance_sampling_correction weighs recomputed log-probs against the rollout's; with "
                "old_logprobs='rollout' none are recomputed, and the ratio holds that gap already"
            )

    def objective(self) -> Objective:
        """What an optimizer step minimises. Adapted coefficients (`use_adaptive_entropy`) are as at the beginning."""
        return Objective(
            clip_range=self.cliprange,
            clip_range_high=self.epsilon_high,
            dual_clip=self.delta,
            value_clip_range=self.cliprange_value,
            vf_coef=self.vf_coef,
            entropy_coef=self.entropy_coef,
            kl_coef=self.beta,
            kl_estimator=self.kl_loss_estimator,
            aggregation=self.loss_aggregation,
            response_length=self.response_length,
            ptx_coef=self.ptx_coef,
            target_kl=self.target_kl,
            ratio_threshold=self.ratio_threshold,
        )

    def set_batch_sizes(self, dataset_size: int) -> None:
        """Fill in the computed fields (batch sizes and number of updates).

        Raises:
            ValueError: the batch does not divide into mini-batches or groups of `num_generations`.
        """

        def divide(name: str, total: int, by_name: str, by: int) -> int:
            if total % by:
                raise ValueError(f"PPOConfig: {name} ({total}) must be a multiple of {by_name} ({by})")
            return total // by

        self.local_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        self.micro_batch_size = self.per_device_train_batch_size * self.world_size
        self.batch_size = self.local_batch_size * self.world_size
        sizes = "per_device_train_batch_size * gradient_accumulation_steps"
        self.local_mini_batch_size = divide(
            sizes, self.local_batch_size, "num_mini_batches", self.num_mini_batches
        )
        divide(sizes, self.local_batch_size, "num_generations", self.num_generations)
        self.mini_batch_size = self.local_mini_batch_size * self.world_size
        if self.total_episodes is None:
            self.total_episodes = max(1, int(self.num_train_epochs * dataset_size * self.num_generations))
        self.num_total_batches = math.ceil(self.total_episodes / self.batch_size)
        if self.max_steps > 0:
            self.num_total_batches = self.max_steps
