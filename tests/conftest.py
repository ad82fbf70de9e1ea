"""What all tests share: contexts, random numbers, hypothesis profiles, and lists of what was emulated and what was left out."""

from __future__ import annotations

import os
import zlib
from collections import defaultdict

import hypothesis
import numpy as np
import pytest

THREAD_COUNTS = (1, 2, 3, 7)

# The bounds of most tests are those of FP32 arithmetic. Integer kernels, which round weights to 8 bits, have suites that ask for them, and
# so do the reference kernels, which others would replace.
os.environ.setdefault("MFA_KERNELS", "float")

# "repeatable" draws the same examples at each run; "explore" others, and more of them: HYPOTHESIS_PROFILE=explore ./justw test
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile("explore", hypothesis.settings.get_profile("repeatable"), derandomize=False, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def contexts():
    """Open contexts by their number of threads."""
    import umfa

    made = {count: umfa.MFAContext(device="cpu", num_threads=count) for count in THREAD_COUNTS}
    yield made
    for context in made.values():
        context.close()


@pytest.fixture(scope="module")
def integer_contexts():
    """What makes a mapping of contexts with the integer kernels of an instruction set by their number of threads, and of "reference", one
    with the reference kernels. It skips the test where the processor lacks the instruction set, and closes them at the module's end.
    """
    import umfa

    made = []

    def make(instruction_set, counts):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MFA_KERNELS", f"{instruction_set},integer")
            try:
                found = {count: umfa.MFAContext(device="cpu", num_threads=count) for count in counts}
            except umfa.DeviceUnavailableError:
                pytest.skip(f"this processor has no {instruction_set}")
            patch.setenv("MFA_KERNELS", "reference")
            found["reference"] = umfa.MFAContext(device="cpu", num_threads=2)
        made.extend(found.values())
        return found

    yield make
    for context in made:
        context.close()


@pytest.fixture
def context():
    """A context of the test's own."""
    import umfa

    with umfa.MFAContext() as made:
        yield made


@pytest.fixture
def rng(request):
    """Random numbers that depend on the test's name alone."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


def pytest_terminal_summary(terminalreporter):
    kernels = [text for report in terminalreporter.stats.get("passed", []) for name, text in report.user_properties if name == "kernels"]
    if kernels:
        terminalreporter.section("kernels")
        for text in kernels:
            terminalreporter.line(text)
    left_out = defaultdict(int)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        left_out[reason.removeprefix("Skipped: ")] += 1
    if left_out:
        terminalreporter.section("left out here")
        for reason, count in sorted(left_out.items()):
            terminalreporter.line(f"{count} tests: {reason}")
