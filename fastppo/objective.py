"""What one optimizer step minimises, in one place: `PPOConfig.objective()` builds it, `update` follows it."""

from __future__ import annotations

from dataclasses import dataclass

AGGREGATIONS = ("token", "sequence", "constant")


@dataclass(frozen=True)
class Objective:
    """The loss of an optimizer step, and when a step is refused.

    ::

        loss = policy_loss + vf_coef value_loss - entropy_coef entropy + kl_coef kl - ptx_coef ptx_logprobs

    The first four terms are those of `ops.ppo_loss`, per token; `aggregation` says what their mean is over. The last is
    the mean log-prob of a supervised text's tokens (Ouyang et al. 2022, arXiv:2203.02155, equation 2).

    Attributes:
        clip_range: how far the ratio may fall below 1 before the gain is cut.
        clip_range_high: how far it may rise above 1; None: `clip_range`.
        dual_clip: bound of the loss where the advantage is negative, as a multiple of it; None: unbounded.
        value_clip_range: how far a value may move from its old estimate.
        vf_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        kl_coef: weight of KL(policy ‖ reference) in the loss.
        kl_estimator: of that term, as in `ops.kl_penalty`.
        aggregation: "token": every counted token of the step weighs the same. "sequence": every episode does, the mean
            of its tokens. "constant": the sum over tokens is divided by episodes * `response_length`, so that a long
            response is not thinned out (Liu et al. 2025, arXiv:2503.20783).
        response_length: most tokens of a response, for "constant".
        ptx_coef: weight of the supervised loss.
        target_kl: an update ends before a step whose approx_kl = mean(½ (log ratio)²) exceeds this; None: never.
        ratio_threshold: a step whose mean ratio exceeds this is not taken; None: all are.
    """

    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    value_clip_range: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    aggregation: str = "token"
    response_length: int = 1
    ptx_coef: float = 0.0
    target_kl: float | None = None
    ratio_threshold: float | None = None
