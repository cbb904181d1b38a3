"""Every op test runs on every backend that has the op's kernels: cpu, emulated, and cuda where there is a device."""

from __future__ import annotations

from collections.abc import Iterator

import backends
import pytest
import torch

# Tests of the backends themselves choose their own.
ABOUT_THE_BACKENDS = ["library", "emulated"]
# Ops without CUDA kernels (CPU_CONCEPTS in CMakeLists.txt).
CPU_ONLY = ["varlen_attention"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    concept = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
    if concept in ABOUT_THE_BACKENDS:
        return
    others = ["emulated"] + (["cuda"] if torch.cuda.is_available() else [])
    names = ["cpu", *([] if concept in CPU_ONLY else others)]
    metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on one backend; tensors that do not name a device are made on its device."""
    name = getattr(request, "param", "cpu")
    if name == "emulated":
        with backends.emulated():
            yield name
    elif name == "cuda":
        torch.set_default_device("cuda")
        yield name
        torch.set_default_device(None)
    else:
        yield name
