"""A step on the device as one CUDA graph: what it launches is recorded once, and then launched at once.

A decode step of a small model is some hundred short kernels, which the host may take longer to launch than the device
to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Graph:
    """`step` as a CUDA graph.

    Args:
        step: what to record. It keeps its state in tensors that stay where they are, waits for nothing, copies nothing
            from or to the host, and may be repeated from the same state.
        state: the tensors that differ after a step. It runs once before it is recorded, so that libraries make their
            workspaces; these tensors are then put back.
    """

    def __init__(self, step: Callable[[], None], state: Sequence[Tensor]) -> None:
        before = [x.clone() for x in state]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        for x, was in zip(state, before, strict=True):
            x.copy_(was)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            step()

    def replay(self) -> None:
        """Take the step."""
        self._graph.replay()
