"""Linear layers on weights that oneDNN has laid out for its own products, for the length of a rollout on the CPU.

A product of a few rows reads a weight once and does little with it; with the weight as it lies, oneDNN copies it into
its own layout at every call. Laying it out once per rollout costs a tenth of a second for 135M weights, and their size
in memory until the rollout ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Where this torch has the products and this processor the instructions for them; else layers are left as they are.
_AVAILABLE = (
    hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    and torch.backends.mkldnn.is_available()
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


def _can_be_packed(layer: nn.Module, frozen: bool) -> bool:
    """Exactly an `nn.Linear` in bfloat16 on the CPU that nothing else has changed: no hook, subclass or wrapper.

    A LoRA layer is none, but the layer inside it is.
    """
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter  # quantised weights are subclasses of Tensor
        and layer.weight.dtype is torch.bfloat16
        and layer.weight.device.type == "cpu"
        and layer.weight.numel() > 0
        and (layer.bias is None or layer.bias.dtype is torch.bfloat16)
        and (frozen or layer.weight.requires_grad)
        and "forward" not in vars(layer)  # accelerate's hooks put themselves there
    )


def _packed_forward(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(x: Tensor) -> Tensor:
        return linear(x, weight, bias, "none", [], "")

    return forward


@contextmanager
def prepacked(model: nn.Module, rows: int, *, frozen: bool = False) -> Iterator[None]:
    """Inside, the model's bfloat16 linear layers on the CPU use packed copies of their weights; no gradients.

    Args:
        model: any model. Layers that are not exactly a bfloat16 `nn.Linear` on the CPU are left alone.
        rows: of the products that matter, which decides on the layout; others are right, too.
        frozen: also pack weights that need no gradient. The copies of trained weights take what their gradients take
            during the update, so the peak of an iteration does not grow; under LoRA nothing makes up for them.
    """
    packed: list[nn.Linear] = []
    try:
        if _AVAILABLE:
            for layer in model.modules():
                if _can_be_packed(layer, frozen):
                    assert isinstance(layer, nn.Linear)
                    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
                    bias = None if layer.bias is None else layer.bias.detach()
                    layer.forward = _packed_forward(weight, bias)  # type: ignore[method-assign, assignment]
                    packed.append(layer)
        yield
    finally:
        for layer in packed:
            del layer.forward
