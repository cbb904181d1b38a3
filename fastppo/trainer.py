"""PPO for language models: prompts → rollout → score → advantages → update → log.

`PPOTrainer` stands where TRL's PPO trainer stood (0.13 to 1.12): same constructor, settings, methods and metric
names. It borrows arguments, Accelerate, optimizer and schedule, callbacks, reporting, saving and the Hub from
`transformers.Trainer`; `train()` is its own and reads as the line above.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LogitsProcessor, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers import ProgressCallback as TransformersProgressCallback
from transformers.trainer_utils import rotate_checkpoints
from transformers.training_args import OptimizerNames

from . import checkpoint, metrics, models
from .advantages import importance_weights, rewards_and_advantages
from .batch import MicroBatch, Rollout, micro_batches
from .config import PPOConfig
from .controllers import EntropyCoefficient, KLCoefficient, ScoreScale, WeightAverage, check_mixable, mix_into
from .environment import Dialogues, check_environment, converse, opened
from .objective import Objective
from .ops import RewardsAndAdvantages
from .optimizer import WITH_MASTER, AdamW, check_optim
from .prompts import PromptOrder, Prompts, check_dataset, check_texts, is_chat, read_prompts, read_texts
from .rollout import DRAWS_PER_EPISODE, Sampling, check_can_be_captured, rollout
from .score import ClassifierReward, Episodes, make_rewards, score, token_scores
from .update import update

logger = logging.getLogger(__name__)

_EVAL_SEED = 1_000_003  # evaluation draws from a stream of its own, the same at every evaluation
_PTX_SEED = 2_000_003  # and so does the order of the supervised texts


class PPOTrainer(Trainer):
    """Proximal Policy Optimization (Schulman et al., 2017) of a causal language model against any reward.

    Args:
        args: settings.
        processing_class: the policy's tokenizer (or a processor that has one).
        model: policy, any `AutoModelForCausalLM` or a PEFT model around one. With `args.bf16` its weights are cast
            to bfloat16 in place.
        ref_model: reference of the KL penalty. None: the policy as it is now (a copy), or, for a PEFT policy, the
            policy without its adapter.
        reward_model: callable `fn(prompts, completions, completion_ids, **columns) -> list[float]` (sync or async;
            TRL's GRPO signature), sequence classifier with one output, URL of a reward server, or a list of these
            weighted by `args.reward_weights`.
        train_dataset: rows with `prompt` (text, or a list of chat messages) or `input_ids`; other columns are
            handed to callable rewards.
        value_model: critic, a decoder-type sequence classifier with one output. None: a value head on the policy's
            own trunk.
        data_collator: as TRL scripts pass it; applied to `input_ids`, its padding is taken off again.
        eval_dataset: prompts for `evaluate()` and `generate_completions()`, or several such by name.
        optimizers: (optimizer, scheduler) instead of those from `args`.
        callbacks: further `transformers.TrainerCallback`s.
        peft_config: trains this adapter instead of the policy's weights.
        reward_processing_classes: tokenizers of reward classifiers that do not share the policy's.
        logits_processor: further `transformers.LogitsProcessor`s of the rollout.
        ptx_dataset: supervised texts of `args.ptx_coef`: rows with `text`, `messages` (a chat), or `input_ids`. Every
            token but the first is learnt.
        value_peft_config: trains this adapter of `value_model` instead of its weights; its `task_type` is "SEQ_CLS".
            With `value_model=None`, a second adapter, "critic", on the base weights of a PEFT policy, and a value head:
            one base in memory is policy, reference and critic, which share no trainable weight.
        environment_factory: makes an `environment.Environment`, which the policy talks with for up to `args.max_turns`
            turns of at most `args.response_length` tokens (the name is that of TRL's GRPO). One is made for each
            episode of a batch and reset for the next. What it gives for each turn is a reward of weight 1 beside
            `reward_model`, which may be None then and gets the instances as the column `environments`.

    Raises:
        ValueError, TypeError: something does not fit; the message names it, what was expected and what came.

    Example:
        >>> trainer = PPOTrainer(PPOConfig("out"), tokenizer, model, None, reward, dataset)
        >>> trainer.train()
        >>> trainer.save_model("out/final")
    """

    _tag_names: ClassVar[list[str]] = ["fastppo", "ppo"]

    # What Trainer declares more loosely.
    args: Any
    state: Any
    lr_scheduler: Any
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any

    def __init__(
        self,
        args: PPOConfig,
        processing_class: Any,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        value_model: nn.Module | None = None,
        data_collator: Callable[[Any], Any] | None = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        reward_processing_classes: Any = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        ptx_dataset: Any = None,
        value_peft_config: Any = None,
        environment_factory: Callable[[], Any] | None = None,
    ) -> None:
        if train_dataset is None:
            raise ValueError("train_dataset is required")
        if reward_model is None and environment_factory is None:
            raise ValueError(
                "reward_model is required: a callable, a sequence classifier, a URL, or a list of these; or an "
                "environment_factory whose environments give rewards"
            )
        if ref_model is model:
            raise ValueError(
                "model and ref_model must not be the same object: pass ref_model=None for a frozen copy"
            )
        check_dataset(train_dataset, "train_dataset")
        parts = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        for name, part in parts.items():
            if part is not None:
                check_dataset(part, f"eval_dataset {name}".rstrip())
        if (ptx_dataset is None) != (args.ptx_coef == 0):
            raise ValueError(
                f"ptx_coef and ptx_dataset need each other, got ptx_coef={args.ptx_coef} and "
                f"{'no' if ptx_dataset is None else 'a'} ptx_dataset"
            )
        if ptx_dataset is not None:
            check_texts(ptx_dataset, "ptx_dataset")
        if logits_processor and args.old_logprobs == "rollout":
            raise ValueError(
                "old_logprobs='rollout' needs a rollout without logits_processor: it changes the logits that are "
                "sampled from, and the ratio would compare two different distributions; use old_logprobs='recompute'"
            )
        self.tokenizer = _tokenizer(processing_class)
        args.set_batch_sizes(len(train_dataset))
        self.rewards = (
            make_rewards(
                reward_model,
                args.reward_weights,
                reward_processing_classes,
                timeout=args.reward_timeout,
                max_rows=args.local_rollout_forward_batch_size,
                padding_free=args.padding_free is not False,
            )
            if reward_model is not None
            else []
        )
        self.environment_factory = environment_factory
        self.environments: list[Any] = []  # made so far, for as many dialogues at a time
        if environment_factory is not None:
            self._environments(1)

        # --- models
        models.check_can_be_saved(model)
        residuals: dict[Tensor, Tensor] = {}  # what the casts take off the weights that are trained
        for module in (model, value_model, ref_model):
            if module is not None and args.bf16:
                taken_off = models.to_bfloat16(module)
                if module is not ref_model:
                    residuals |= taken_off
        if peft_config is not None:
            model = _with_adapter(model, peft_config, "model", "peft_config")
        self.is_peft_model = models.is_peft(model)
        if self.is_peft_model and args.model_adapter_name is not None:
            model.set_adapter(args.model_adapter_name)  # type: ignore[operator]
        if value_peft_config is not None:
            value_model = _critic_with_adapter(model, value_model, value_peft_config)
        for module in (model, value_model, ref_model):  # adapters may have brought dropout of their own
            if module is not None:
                models.disable_dropout(module)
        if ref_model is None and not self.is_peft_model:
            ref_model = models.frozen_copy(model)
        if args.sync_ref_model:
            if ref_model is None:
                raise ValueError("sync_ref_model needs a ref_model: a PEFT policy is its own reference")
            check_mixable(ref_model, model)
        if args.offload_ref_model and ref_model is None:
            raise ValueError(
                "offload_ref_model needs a ref_model: a PEFT policy is its own reference and cannot leave the device"
            )
        if args.reuse_scoring_forward and args.world_size > 1:
            raise ValueError(
                f"reuse_scoring_forward needs one process, got {args.world_size}: DDP exchanges gradients of its own "
                "forward alone"
            )
        use_cache = getattr(models.text_config(model), "use_cache", True)
        models.check_head(model.eval())
        actor_critic = models.ActorCritic(model, value_model)

        super().__init__(
            model=actor_critic,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._prompt_collator = data_collator
        models.text_config(model).use_cache = use_cache  # Trainer turns it off, and it would be saved so
        if self.accelerator.distributed_type not in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        ):
            raise NotImplementedError(
                f"PPOTrainer runs on one process or under DDP, got {self.accelerator.distributed_type}"
            )
        if ref_model is not None:
            ref_model.to("cpu" if args.offload_ref_model else args.device).eval().requires_grad_(False)
        self.ref_model = ref_model
        for reward in self.rewards:
            if isinstance(reward.function, ClassifierReward):
                reward.function.place(args.device, offload=args.offload_reward_model)
        if args.gradient_checkpointing:
            for module in (model, value_model):
                if module is not None:
                    models.recompute_activations(module, args.gradient_checkpointing_kwargs)
        self.actor_critic = actor_critic
        self.padding_free = self._can_do_without_padding()
        self.ptx_dataset = ptx_dataset
        self.objective: Objective = args.objective()
        if environment_factory is not None:
            self.objective = replace(self.objective, response_length=args.response_length * args.max_turns)
        self.max_length = _max_length(args, model)
        self.kl_coef = KLCoefficient(
            args.kl_coef, adaptive=args.adap_kl_ctrl, target=args.target, horizon=args.horizon
        )
        self.entropy_coef = EntropyCoefficient(
            args.entropy_coef,
            adaptive=args.use_adaptive_entropy,
            target=args.entropy_target,
            least=args.entropy_coef_min,
            most=args.entropy_coef_max,
            step=args.entropy_coef_delta,
        )
        self.score_scale = ScoreScale(scale=args.use_score_scaling, center=args.use_score_norm)
        self.ema = (
            WeightAverage(model, args.ema_decay, skip_adapter=models.CRITIC_ADAPTER)
            if args.ema_decay is not None
            else None
        )
        self._create_optimizer_and_scheduler()
        if isinstance(self.optimizer, AdamW):
            self.optimizer.keep_residuals(residuals)
        # DDP must be told that a network trained on its own leaves the other without gradients.
        apart = len(actor_critic.networks) > 1 or args.critic_warmup_updates > 0
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(
            find_unused_parameters=args.ddp_find_unused_parameters or apart
        )
        self.model_wrapped, self.optimizer = self.accelerator.prepare(actor_critic, self.optimizer)
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = (
            self.optimizer,
            self.lr_scheduler,
        )

        self.stop_token_id = args.stop_token_id
        self.logits_processor = tuple(logits_processor)
        self.sampling = Sampling(
            max_new_tokens=args.response_length,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p or 0.0,
            repetition_penalty=args.repetition_penalty,
            min_new_tokens=args.min_new_tokens,
            stop_token_ids=_stop_token_ids(args, self.tokenizer, model),
            stop_strings=tuple(args.stop_strings or ()),
        )
        if args.cuda_graphs:
            check_can_be_captured(model, self.sampling, self.logits_processor)
        pad = self.tokenizer.pad_token_id
        # Only a filler: no mask is ever read from it.
        self.pad_token_id = pad if pad is not None else (self.tokenizer.eos_token_id or 0)
        self.state.episode = 0
        if self.callback_handler.pop_callback(TransformersProgressCallback) is not None:
            self.add_callback(metrics.ProgressCallback)

    # --- the story ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Train for `args.num_total_batches` updates.

        Args:
            kwargs: unused; for compatibility with `transformers.Trainer`.
            resume_from_checkpoint: a checkpoint folder, or True for the newest in `args.output_dir`. The run goes on
                exactly as it would have: same prompts, draws and order.

        Raises:
            FileNotFoundError: there is no such checkpoint.
        """
        args = self.args
        self._begin(resume_from_checkpoint)
        prompts = self._prompt_batches()
        started, first_step = time.perf_counter(), self.state.global_step

        for _ in range(first_step, args.num_total_batches):
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            clock = _Clock()
            batch = next(prompts)
            episodes = self._rollout(batch)
            clock.lap("rollout")
            scored = self._to_reuse()
            tokens = self._evaluate_tokens(episodes, args.old_logprobs, scored)
            scores, each = self._score(batch, episodes)
            clock.lap("score")
            result, weights = self._advantages(episodes, tokens, scores)
            means = self._update(episodes, tokens, result, scored)
            clock.lap("update")

            self.state.global_step += 1
            self.state.episode += args.batch_size
            self.state.epoch = self.state.episode / (len(self.train_dataset) * args.num_generations)
            report = metrics.episode_metrics(
                episodes, scores, each, tokens.logprobs, result, tokens.values, self.kl_coef.value, weights
            )
            report |= metrics.sampling_gap(episodes, tokens.logprobs, args.old_logprobs, means)
            report |= metrics.update_metrics(means, self._objective())
            report |= {f"time/{room}": seconds for room, seconds in clock.laps.items()}
            counted = float(episodes.response_mask.sum())
            report = metrics.mean_over_ranks(report | {"tokens_per_second": counted / clock.total})
            report["tokens_per_second"] *= args.world_size
            done = self.state.global_step - first_step
            report["eps"] = done * args.batch_size / (time.perf_counter() - started)
            report["lr"] = float(self.lr_scheduler.get_last_lr()[0])  # torchao keeps it as a tensor
            report["episode"] = self.state.episode
            if args.use_score_scaling:
                report |= {
                    "objective/scores_running_mean": self.score_scale.mean,
                    "objective/scores_running_std": self.score_scale.std,
                }
            self.log(report)
            self._adapt(report)
            self.lr_scheduler.step()
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            self._evaluate_save_and_show(report)
            if self.control.should_training_stop:
                break

        self._end()

    # --- rooms, with their settings ----------------------------------------------------------------------------------

    def _rollout(self, batch: Prompts) -> Rollout:
        args = self.args
        episodes = self._generate(
            batch,
            self.sampling,
            args.seed,
            self._first_episode(),
            args.num_generations,
            self.logits_processor,
        )
        return episodes.without_truncated() if args.mask_truncated_completions else episodes

    def _generate(
        self,
        batch: Prompts,
        sampling: Sampling,
        seed: int,
        first_episode: int,
        num_generations: int = 1,
        logits_processor: Sequence[LogitsProcessor] = (),
    ) -> Rollout:
        """Responses to a batch of prompts, or dialogues that begin with them."""
        settings: dict[str, Any] = {
            "pad_token_id": self.pad_token_id,
            "seed": seed,
            "max_rows": self.args.local_rollout_forward_batch_size,
            "tokenizer": self.tokenizer,
            "logits_processor": logits_processor,
            "cuda_graphs": self.args.cuda_graphs,
        }
        if self.environment_factory is None:
            return rollout(
                self._policy(),
                batch.ids,
                sampling,
                first_episode=first_episode,
                num_generations=num_generations,
                **settings,
            )

        def turn(contexts: list[list[int]], numbers: list[int], positions: list[int]) -> Rollout:
            # A token's draw is that of its place in the dialogue, whoever else still talks.
            draws = [
                (first_episode + number) * DRAWS_PER_EPISODE + position
                for number, position in zip(numbers, positions, strict=True)
            ]
            return rollout(self._policy(), contexts, sampling, first_draws=draws, **settings)

        return converse(
            turn,
            batch.ids,
            batch.given,
            batch.columns["environments"],
            tokenizer=self.tokenizer,
            pad_token_id=self.pad_token_id,
            turn_length=sampling.max_new_tokens,
            max_turns=self.args.max_turns,
            max_length=self.max_length,
            timeout=self.args.environment_timeout,
        )

    def _first_episode(self) -> int:
        """Number of this rank's first episode in the next update."""
        return self.state.episode + self.args.process_index * self.args.local_batch_size

    def _to_reuse(self) -> list[models.Scored] | None:
        """An empty list for the scoring to fill, where the update wants its graphs."""
        warming_up = self.state.global_step < self.args.critic_warmup_updates
        return [] if self.args.reuse_scoring_forward and not warming_up else None

    @torch.no_grad()
    def _evaluate_tokens(
        self, episodes: Rollout, old_logprobs: str = "recompute", scored: list[models.Scored] | None = None
    ) -> _TokenScores:
        """What policy, critic and reference say of the sampled tokens, on the path that training takes.

        With `old_logprobs="rollout"` the policy's log-probs are those that the rollout noted. Its own forward is left
        out then, head or trunk, where nothing else needs it. With a list `scored`, nothing is left out, micro-batches
        are the update's, and policy and critic run as in training; their graphs are put there.
        """
        temperature, full = self.args.temperature, self.args.kl_estimator == "full"
        recompute, policy = old_logprobs == "recompute", self._policy()
        needs_head = recompute or scored is not None
        needs_states = needs_head or full or self.actor_critic.value_head_reads_policy
        self.actor_critic.eval()
        head = models.lm_head(
            policy
        )  # before the reference, which may be the same module, takes its adapter off

        def evaluate(batch: MicroBatch) -> tuple[Tensor | None, ...]:
            logprobs = entropy = hidden = kl = None
            with self._as_in_training() if scored is not None else nullcontext():
                if needs_states:
                    hidden = models.predicting_states(policy, batch)
                    if needs_head:
                        logprobs, entropy = models.head_logprobs(
                            policy, hidden, batch.target_ids, temperature
                        )
                values = self.actor_critic.values(batch, hidden)
            if scored is not None:
                said = models.Evaluation(logprobs, entropy, values)
                scored.append(models.Scored(batch, self.actor_critic.by_network(said)))
            with self.null_ref_context() as reference:
                ref_hidden = models.predicting_states(reference, batch)
                ref_logprobs = models.head_logprobs(reference, ref_hidden, batch.target_ids, temperature)[0]
                if full:
                    assert hidden is not None
                    kl = models.full_kl(head, hidden, models.lm_head(reference), ref_hidden, temperature)
            return logprobs if recompute else None, values, ref_logprobs, kl

        reference_at_hand = (
            models.visiting(self._reference(), self.args.device)
            if self.args.offload_ref_model
            else nullcontext()
        )
        with reference_at_hand:
            found = token_scores(
                evaluate, self._micro_batches(episodes, training=scored is not None), episodes
            )
        logprobs, values, ref_logprobs, kl = found
        if logprobs is None:
            logprobs = episodes.logprobs.masked_fill(~episodes.response_mask, 0.0)
        assert values is not None and ref_logprobs is not None
        return _TokenScores(logprobs, values, ref_logprobs, kl)

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        """Within the block policy and critic keep what their backward needs."""
        # transformers recomputes activations only in train mode; dropout is off, so nothing else changes.
        self.model_wrapped.train(bool(self.args.gradient_checkpointing))
        try:
            with torch.enable_grad():
                yield
        finally:
            self.model_wrapped.eval()

    def _micro_batches(self, episodes: Rollout, *, training: bool = False) -> Iterator[MicroBatch]:
        """Of all episodes, as large as the update's, or as a forward alone allows."""
        args = self.args
        rows = args.per_device_train_batch_size if training else args.local_rollout_forward_batch_size
        return micro_batches(
            episodes,
            range(len(episodes)),
            pad_token_id=self.pad_token_id,
            max_rows=rows if args.micro_batch_tokens is None else None,
            max_tokens=args.micro_batch_tokens,
            padding_free=self.padding_free,
        )

    def _score(self, batch: Prompts, episodes: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        scores, each = self._scores(batch, episodes)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * episodes.truncated.float()
        return scores, each

    def _scores(self, batch: Prompts, episodes: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Of whole responses, and each reward's share."""
        scores, each = score(self.rewards, self._episodes(batch, episodes), self.args.device)
        if isinstance(episodes, Dialogues):
            each["environment"] = episodes.turn_rewards.sum(1)
            scores = scores + each["environment"]
        return scores, each

    def _episodes(self, batch: Prompts, episodes: Rollout) -> Episodes:
        """What a reward sees: each prompt `num_generations` times, each completion as text."""
        repeats = len(episodes) // len(batch.ids)
        prompts = [p for p in batch.given for _ in range(repeats)]
        completion_ids = episodes.completions()
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        if isinstance(episodes, Dialogues):
            messages = episodes.messages
        else:
            messages = [[{"role": "assistant", "content": text}] for text in texts]
        completions: list[Any] = [
            said if is_chat(prompt) else text
            for prompt, said, text in zip(prompts, messages, texts, strict=True)
        ]
        columns = {
            name: [v for v in values for _ in range(repeats)] for name, values in batch.columns.items()
        }
        return Episodes(prompts, completions, completion_ids, episodes.prompt_ids, columns)

    def _advantages(
        self, episodes: Rollout, tokens: _TokenScores, scores: Tensor
    ) -> tuple[RewardsAndAdvantages, Tensor | None]:
        """Rewards, advantages and returns, and the importance weights that the advantages hold, if any."""
        args = self.args
        mask = episodes.response_mask
        scores, turn_rewards = self.score_scale(scores, mask.any(1)), None
        if isinstance(episodes, Dialogues):  # what is left of a dialogue's score stands at its end
            turn_rewards = episodes.turn_rewards / self.score_scale.std
            scores = scores - turn_rewards.sum(1)
        result = rewards_and_advantages(
            scores,
            tokens.logprobs,
            tokens.ref_logprobs,
            tokens.values,
            mask,
            kl_coef=self.kl_coef.value,
            estimator=args.kl_estimator,
            reward_clip=args.reward_clip,
            whiten_rewards=args.whiten_rewards,
            whiten_advantages=args.whiten_advantages,
            gamma=args.gamma,
            lam=args.lam,
            lam_critic=args.lam_critic,
            full_kl=tokens.kl,
            turn_rewards=turn_rewards,
        )
        if not args.importance_sampling_correction:
            return result, None
        weights = importance_weights(tokens.logprobs, episodes.logprobs, args.importance_sampling_cap)
        return result._replace(advantages=result.advantages * weights), weights

    def _objective(self) -> Objective:
        """What the next update minimises."""
        return replace(self.objective, entropy_coef=self.entropy_coef.value)

    def _update(
        self,
        episodes: Rollout,
        tokens: _TokenScores,
        result: RewardsAndAdvantages,
        scored: list[models.Scored] | None = None,
    ) -> dict[str, float]:
        args = self.args
        with self._as_in_training():
            return update(
                self.model_wrapped,
                self.optimizer,
                episodes,
                logprobs=tokens.logprobs,
                values=tokens.values,
                advantages=result.advantages,
                returns=result.returns,
                ref_logprobs=tokens.ref_logprobs,
                objective=self._objective(),
                temperature=args.temperature,
                epochs=args.num_ppo_epochs,
                mini_batches=args.num_mini_batches,
                micro_batch_rows=args.per_device_train_batch_size
                if args.micro_batch_tokens is None
                else None,
                micro_batch_tokens=args.micro_batch_tokens,
                max_grad_norm=args.max_grad_norm,
                pad_token_id=self.pad_token_id,
                seed=args.seed + self.state.global_step,
                accelerator=self.accelerator,
                critic_only=self.state.global_step < args.critic_warmup_updates,
                texts=self._texts(),
                padding_free=self.padding_free,
                scored=scored,
            )

    def _adapt(self, report: dict[str, float]) -> None:
        """After an update, move what follows from its outcome."""
        args = self.args
        self.kl_coef.observe(report["objective/kl"], args.batch_size)
        trained = self.state.global_step > args.critic_warmup_updates
        if trained and report["policy/optimizer_steps"] > 0:
            self.entropy_coef.observe(report["policy/entropy_avg"])
        if self.ema is not None:
            self.ema.update(self._policy())
        if args.sync_ref_model and self.state.global_step % args.ref_model_sync_steps == 0:
            mix_into(self._reference(), self._policy(), args.ref_model_mixup_alpha)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        *,
        ema: bool = False,
    ) -> dict[str, float]:
        """Mean score, KL to the reference, and length of sampled responses to the evaluation prompts.

        Args:
            eval_dataset: rows like the training set's, or a dict of such datasets. Default: the trainer's.
            ignore_keys: unused; for compatibility.
            metric_key_prefix: put before each metric's name.
            ema: evaluate the average of the policy (`args.ema_decay`) instead of the policy.

        Returns:
            `<prefix>_objective/scores`, `<prefix>_objective/kl`, `<prefix>_completions/mean_length`, ...
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate: expected an eval_dataset, got None here and in the constructor")
        if isinstance(dataset, dict):
            report: dict[str, float] = {}
            for name, part in dataset.items():
                report |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}", ema=ema)
            return report
        with self.ema_weights() if ema else nullcontext():
            rows = self._completions(dataset, self.sampling)
        number = {
            k: torch.tensor([float(r[k]) for r in rows]) for k in ("score", "kl", "length", "truncated")
        }
        report = {
            f"{metric_key_prefix}_objective/scores": number["score"].mean().item(),
            f"{metric_key_prefix}_objective/scores_std": number["score"].std(correction=0).item(),
            f"{metric_key_prefix}_objective/kl": number["kl"].mean().item(),
            f"{metric_key_prefix}_completions/mean_length": number["length"].mean().item(),
            f"{metric_key_prefix}_completions/clipped_ratio": number["truncated"].mean().item(),
        }
        report = metrics.mean_over_ranks(report)
        self.log(dict(report))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, report)
        return report

    def generate_completions(self, sampling: bool = False) -> list[dict[str, Any]]:
        """Greedy responses to evaluation prompts: printed, saved under `output_dir/completions`, and returned.

        Args:
            sampling: only one batch (`per_device_eval_batch_size`) of prompts instead of all.

        Returns:
            One row per prompt: query, model response, score, kl, length, truncated.
        """
        if self.eval_dataset is None:
            return []
        dataset = (
            next(iter(self.eval_dataset.values()))
            if isinstance(self.eval_dataset, dict)
            else self.eval_dataset
        )
        most = self.args.per_device_eval_batch_size if sampling else len(dataset)
        greedy = Sampling(
            max_new_tokens=self.sampling.max_new_tokens,
            top_k=1,
            stop_token_ids=self.sampling.stop_token_ids,
            stop_strings=self.sampling.stop_strings,
        )
        rows = self._completions(dataset, greedy, most)
        if self.args.process_index == 0:
            metrics.save_completions(rows, self.args.output_dir, self.state.global_step)
            shown = [{k: r[k] for k in ("query", "model response", "score")} for r in rows]
            metrics.print_completions(shown, f"Completions after {self.state.global_step} updates")
            self._log_table(shown)
        return rows

    def _completions(self, dataset: Any, sampling: Sampling, most: int | None = None) -> list[dict[str, Any]]:
        """Responses of this rank's share of a dataset, with score and KL of each. Draws are the same every time."""
        indices = range(
            self.args.process_index, min(most or len(dataset), len(dataset)), self.args.world_size
        )
        size = max(1, self.args.local_rollout_forward_batch_size)
        rows: list[dict[str, Any]] = []
        for start in range(0, len(indices), size):
            seed = self.args.seed + _EVAL_SEED
            batch = self._read([dataset[i] for i in indices[start : start + size]], seed, start)
            episodes = self._generate(batch, sampling, seed, start)
            tokens = self._evaluate_tokens(episodes)
            scores = self._scores(batch, episodes)[0]
            kl = tokens.logprobs - tokens.ref_logprobs if tokens.kl is None else tokens.kl
            kl = kl.masked_fill(~episodes.response_mask, 0.0).sum(1)
            queries = self.tokenizer.batch_decode(batch.ids, skip_special_tokens=True)
            texts = self.tokenizer.batch_decode(episodes.completions(), skip_special_tokens=True)
            if isinstance(episodes, Dialogues):
                texts = ["\n".join(f"{m['role']}: {m['content']}" for m in x) for x in episodes.messages]
            for i in range(len(batch.ids)):
                rows.append(
                    {
                        "query": queries[i],
                        "model response": texts[i],
                        "score": scores[i].item(),
                        "kl": kl[i].item(),
                        "length": int(episodes.response_lengths[i]),
                        "truncated": bool(episodes.truncated[i]),
                    }
                )
        return rows

    def _log_table(self, rows: list[dict[str, Any]]) -> None:
        if "wandb" in self.args.report_to:
            import wandb  # type: ignore[import-not-found]

            if wandb.run is not None:
                table = wandb.Table(columns=list(rows[0]), data=[list(r.values()) for r in rows])
                wandb.log({"completions": table})

    # --- prompts -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of training rows from where the run stands, without end; every epoch in a new order."""
        args = self.args
        block = args.local_batch_size // args.num_generations
        order = PromptOrder(
            len(self.train_dataset),
            args.seed if args.data_seed is None else args.data_seed,
            start=self.state.global_step * block * args.world_size,
            block=block,
            rank=args.process_index,
            ranks=args.world_size,
        )
        return DataLoader(
            self.train_dataset,
            batch_size=block,
            sampler=order,
            collate_fn=list,
            num_workers=args.dataloader_num_workers,
            # Its own, or a resumed run would draw once more from torch's than the run itself.
            generator=torch.Generator().manual_seed(args.seed),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches of evaluation rows, in order."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(dataset, batch_size=self.args.per_device_eval_batch_size, collate_fn=list)

    def _prompt_batches(self) -> Iterator[Prompts]:
        args = self.args
        for rows in self.get_train_dataloader():
            if self.environment_factory is not None:  # each has a beginning of its own
                rows = [row for row in rows for _ in range(args.num_generations)]
            yield self._read(rows, args.seed, self._first_episode())

    def _read(self, rows: Sequence[Any], seed: int, first_episode: int) -> Prompts:
        args = self.args
        environments: list[Any] = []
        if self.environment_factory is not None:
            environments = self._environments(len(rows))
            numbers = range(first_episode, first_episode + len(rows))
            seeds = [seed * DRAWS_PER_EPISODE + i for i in numbers]
            rows = opened(rows, environments, seeds, args.environment_timeout)
        prompts = read_prompts(
            rows, self.tokenizer, data_collator=self._prompt_collator, max_length=args.max_prompt_length
        )
        if environments:
            prompts.columns["environments"] = environments
        return prompts

    def _environments(self, count: int) -> list[Any]:
        """As many environments, made once."""
        assert self.environment_factory is not None
        while len(self.environments) < count:
            self.environments.append(self.environment_factory())
            check_environment(self.environments[-1])
        return self.environments[:count]

    def _texts(self) -> Iterator[list[list[int]]] | None:
        """Token ids of the supervised texts of each optimizer step of this update; None: there are none.

        An update begins at a place in the order that follows from its number, however many steps earlier ones took.
        """
        args = self.args
        if self.ptx_dataset is None:
            return None
        size = args.ptx_batch_size or args.local_mini_batch_size
        steps = args.num_ppo_epochs * args.num_mini_batches
        order = PromptOrder(
            len(self.ptx_dataset),
            (args.seed if args.data_seed is None else args.data_seed) + _PTX_SEED,
            start=self.state.global_step * steps * size * args.world_size,
            block=size,
            rank=args.process_index,
            ranks=args.world_size,
        )
        rows = iter(order)
        return (
            read_texts(
                [self.ptx_dataset[next(rows)] for _ in range(size)], self.tokenizer, args.ptx_max_length
            )
            for _ in range(steps)
        )

    # --- models ------------------------------------------------------------------------------------------------------

    def _policy(self) -> nn.Module:
        return self.actor_critic.policy

    def _reference(self) -> nn.Module:
        assert self.ref_model is not None
        return self.ref_model

    def _can_do_without_padding(self) -> bool:
        """Does what `args.padding_free` asks for go with every model that sees the episodes' tokens?"""
        if self.args.padding_free is False:
            return False
        trunks = self.actor_critic.trunks
        if self.ref_model is not None:
            trunks.append(models.causal_trunk(self.ref_model))
        reason = models.why_not_padding_free(trunks)
        if self.args.padding_free and reason is not None:
            raise ValueError(f"padding_free=True does not go with these models: {reason}")
        if reason is not None:
            logger.warning("micro-batches are padded: %s", reason)
        return reason is None

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within the block the policy is its exponential moving average.

        Raises:
            ValueError: none is kept.
        """
        if self.ema is None:
            raise ValueError("there is no average of the policy: set PPOConfig.ema_decay")
        with self.ema.in_place_of(self._policy()):
            yield

    @contextmanager
    def null_ref_context(self) -> Iterator[nn.Module]:
        """The reference: the reference model, or the PEFT policy with its adapter disabled or exchanged."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        with models.adapters_off(self._policy(), self.args.ref_adapter_name) as reference:
            yield reference

    def _create_optimizer_and_scheduler(self) -> None:
        args = self.args
        half = any(p.requires_grad and p.dtype is torch.bfloat16 for p in self.actor_critic.parameters())
        if self.optimizer is not None:
            if half and not isinstance(self.optimizer, AdamW):
                warnings.warn(
                    "the trained weights are bfloat16: unless this optimizer keeps a float32 master of them, as "
                    "fastppo.optimizer.AdamW does, it loses small updates",
                    stacklevel=3,
                )
        else:
            check_optim(OptimizerNames(args.optim).value, args.optim_args, bfloat16=half)
            if half and args.optim in WITH_MASTER:
                betas = (args.adam_beta1, args.adam_beta2)
                self.optimizer_cls_and_kwargs = (
                    AdamW,
                    {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon},
                )
        self.create_optimizer_and_scheduler(num_training_steps=args.num_total_batches)

    # --- beginning, end and disk -------------------------------------------------------------------------------------

    def _begin(self, resume_from_checkpoint: str | bool | None) -> None:
        args = self.args
        if resume_from_checkpoint:
            self._resume(resume_from_checkpoint)
        state = self.state
        state.max_steps = args.num_total_batches
        state.num_train_epochs = args.total_episodes / (len(self.train_dataset) * args.num_generations)
        state.train_batch_size = args.per_device_train_batch_size
        for name in ("logging_steps", "eval_steps", "save_steps"):
            steps = getattr(args, name)
            if steps is not None:
                setattr(state, name, math.ceil(state.max_steps * steps) if steps < 1 else int(steps))
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        self.is_in_train = True
        self.model_wrapped.eval()
        self.control = self.callback_handler.on_train_begin(args, state, self.control)

    def _evaluate_save_and_show(self, report: dict[str, float]) -> None:
        args = self.args
        best = False
        if self.control.should_evaluate:
            found = self.evaluate()
            if args.metric_for_best_model not in (None, "loss"):
                best = self._determine_best_metric(metrics=found, trial=None)
        if self.control.should_save or (args.save_strategy == "best" and best):
            self._save_checkpoint(self.actor_critic, trial=None)
            self.control = self.callback_handler.on_save(args, self.state, self.control)
        if args.num_sample_generations:
            every = max(1, args.num_total_batches // args.num_sample_generations)
            if (self.state.global_step - 1) % every == 0:
                self.generate_completions(sampling=True)

    def _end(self) -> None:
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            checkpoint.restore_actor_critic(self.actor_critic, Path(best))
        self.is_in_train = False
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False, *, ema: bool = False
    ) -> None:
        """Save policy, tokenizer and critic (`critic/`) under a temporary name, then rename.

        `AutoModelForCausalLM.from_pretrained(output_dir)` reads the policy, `fastppo.load_actor_critic` both. An
        average of the policy (`args.ema_decay`) is saved beside it, in `ema/`; with `ema=True` in its place.
        """
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if self.args.should_save:
            with checkpoint.written_then_renamed(output_dir) as folder:
                with self.ema_weights() if ema else nullcontext():
                    self._save(str(folder))
                if self.ema is not None and not ema:
                    with self.ema_weights():
                        checkpoint.save_policy(self._policy(), folder / checkpoint.EMA)
                    self.processing_class.save_pretrained(folder / checkpoint.EMA)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_actor_critic(self.actor_critic, folder)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Policy, critic, optimizer, schedule and state, in `checkpoint-<updates>`."""
        if not self.args.should_save:
            return
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with checkpoint.written_then_renamed(final) as folder:
            self._save(str(folder))
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_adapted(folder)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(folder / "trainer_state.json"))
            (folder / "episodes.txt").write_text(f"{self.state.episode}\n")
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        rotate_checkpoints(
            output_dir=self.args.output_dir,
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=False,
        )

    def _resume(self, resume_from_checkpoint: str | bool) -> None:
        if resume_from_checkpoint is True:
            found = checkpoint.last_checkpoint(self.args.output_dir)
        else:
            found = Path(resume_from_checkpoint)  # type: ignore[arg-type]
        if found is None or not (found / "trainer_state.json").exists():
            raise FileNotFoundError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: no checkpoint with a trainer_state.json found in "
                f"{found or self.args.output_dir}"
            )
        checkpoint.restore_actor_critic(self.actor_critic, found)
        self._load_optimizer_and_scheduler(str(found))
        self._load_adapted(found)
        self.state = TrainerState.load_from_json(str(found / "trainer_state.json"))
        self.state.episode = int((found / "episodes.txt").read_text())

    def _adapted(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef, "entropy_coef": self.entropy_coef, "score_scale": self.score_scale}

    def _save_adapted(self, folder: Path) -> None:
        states = {name: x.state_dict() for name, x in self._adapted().items()}
        (folder / checkpoint.CONTROLLERS).write_text(json.dumps(states, indent=2) + "\n")
        checkpoint.save_random_state(folder / checkpoint.RANDOM_STATE)
        if self.ema is not None:
            checkpoint.save_tensors(self.ema.state_dict(), folder / f"{checkpoint.EMA}.safetensors")
        if self.args.sync_ref_model:
            self._reference().save_pretrained(folder / checkpoint.REFERENCE)  # type: ignore[operator]

    def _load_adapted(self, folder: Path) -> None:
        if not (folder / checkpoint.CONTROLLERS).exists():
            raise FileNotFoundError(
                f"checkpoint {folder} holds no {checkpoint.CONTROLLERS}: one of save_only_model cannot be resumed"
            )
        states = json.loads((folder / checkpoint.CONTROLLERS).read_text())
        for name, x in self._adapted().items():
            x.load_state_dict(states[name])
        checkpoint.load_random_state(folder / checkpoint.RANDOM_STATE)
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint.load_tensors(folder / f"{checkpoint.EMA}.safetensors"))
        if self.args.sync_ref_model:
            checkpoint.restore(self._reference(), folder / checkpoint.REFERENCE)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The model card of `transformers.Trainer`, tagged fastppo and ppo."""
        if self.args.should_save:
            os.makedirs(self.args.output_dir, exist_ok=True)
            kwargs.setdefault("tags", self._tag_names)
            super().create_model_card(*args, **kwargs)


class _TokenScores(NamedTuple):
    """What the models say of sampled tokens: (B, T) float32, 0 where none counts; `kl` with the estimator "full"."""

    logprobs: Tensor
    values: Tensor
    ref_logprobs: Tensor
    kl: Tensor | None = None


class _Clock:
    """Seconds spent in each room of an update."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, room: str) -> None:
        if torch.accelerator.is_available():  # what a room started is its own
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.laps[room] = now - self.last
        self.last = now

    @property
    def total(self) -> float:
        return self.last - self.start


def _tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class must be a tokenizer or a processor that has one, got {type(processing_class).__name__}"
        )
    return tokenizer


def _max_length(args: PPOConfig, model: nn.Module) -> int | None:
    """Most tokens of a dialogue."""
    limit = models.context_length(model)
    if args.max_length is not None and limit is not None and args.max_length > limit:
        raise ValueError(f"max_length ({args.max_length}) exceeds the model's context of {limit} tokens")
    return limit if args.max_length is None else args.max_length


def _stop_token_ids(args: PPOConfig, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> tuple[int, ...]:
    """`stop_token_id`, or else the EOS of the tokenizer and those that the model's generation config names."""
    if args.stop_token_id is not None:
        return (args.stop_token_id,)
    generation_config = getattr(models.unwrap_peft(model), "generation_config", None)
    named = getattr(generation_config, "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    return tuple(sorted({int(i) for i in [tokenizer.eos_token_id, *named] if i is not None}))


def _with_adapter(model: nn.Module, peft_config: Any, model_name: str, config_name: str) -> nn.Module:
    _check_peft_config(peft_config, config_name)
    if models.is_peft(model):
        raise ValueError(
            f"{model_name} is a PEFT model already: merge its adapter first, or pass it without {config_name}"
        )
    from peft import get_peft_model

    return get_peft_model(model, peft_config)


def _critic_with_adapter(
    policy: nn.Module, value_model: nn.Module | None, peft_config: Any
) -> nn.Module | None:
    """The critic's adapter, on the critic, or (None is returned) on the policy's base weights."""
    name = "value_peft_config"
    if value_model is None:
        _check_peft_config(peft_config, name)
        if not models.is_peft(policy):
            raise ValueError(
                f"{name} needs a value_model, or a PEFT policy (peft_config) on whose base weights its adapter can be; "
                "got neither"
            )
        models.add_critic_adapter(policy, peft_config)
        return None
    if getattr(peft_config, "task_type", "SEQ_CLS") != "SEQ_CLS":
        raise ValueError(
            f"{name} must have task_type='SEQ_CLS', or the layer that gives the values would be neither trained nor "
            f"saved; got {peft_config.task_type!r}"
        )
    return _with_adapter(value_model, peft_config, "value_model", name)


def _check_peft_config(peft_config: Any, name: str) -> None:
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ImportError(f"{name} needs the peft library: pip install 'fastppo[peft]'") from error
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"{name} must be a peft.PeftConfig (LoraConfig, ...), got {type(peft_config).__name__}"
        )
