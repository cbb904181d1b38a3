"""`logprobs` of a language-model head applied to hidden states, in plain torch: it does build [N, V]."""

from __future__ import annotations

from torch import Tensor

from .logprobs import logprobs


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `ids` and entropies under the head `hidden @ weight.T + bias`.

    logits = logit_scale * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap).
    """
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logprobs(logits, ids, temperature=temperature)
