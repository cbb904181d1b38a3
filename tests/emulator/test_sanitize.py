"""Every kernel under ThreadSanitizer (one std::thread per CUDA thread) and under AddressSanitizer and UBSan (fibers).

test_emulator.py plants faults that show each of these runs can fail. `make sanitize` also runs the op tests on a
library of emulated kernels that is built with AddressSanitizer and UBSan.
"""

import backends
import pytest
from emulator.builds import program, run

CONCEPTS = sorted(path.stem for path in (backends.ROOT / "csrc" / "cuda").glob("*.cu"))


def test_every_concept_with_kernels_is_in_the_program():
    assert run(program("address", "kernels")).stdout.split() == CONCEPTS


@pytest.mark.parametrize("build", ["address", "thread"])
@pytest.mark.parametrize("concept", CONCEPTS)
def test_no_sanitizer_finds_anything(concept, build):
    for order in range(3 if build == "address" else 1):  # threads have no order
        got = run(program(build, "kernels"), concept, str(order))
        assert got.returncode == 0 and got.stdout == "ok\n", got.stdout + got.stderr
