"""Freed memory is kept inside the block and given back after it."""

import subprocess
import sys

import pytest

from bert_encoding import freed_memory
from bert_encoding.freed_memory import KEEPING, RETURNING, keeping_freed_memory, return_freed_memory

# In a process of its own, whose heap nobody else has used; 64 MB a time, more than glibc ever keeps of itself.
FAULTS = """
import resource, sys
import numpy as np
from bert_encoding.freed_memory import keeping_freed_memory, return_freed_memory

def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        np.ones(2**23)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / n

before = faults(5)
with keeping_freed_memory():
    np.ones(2**23)
    inside = faults(5)
return_freed_memory()
print(before, inside, faults(5))
"""


@pytest.mark.skipif(sys.platform != "linux" or freed_memory._of_glibc("mallopt") is None, reason="needs glibc")
def test_a_block_that_is_freed_is_used_again_inside_and_returned_outside() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, inside, after = map(float, done.stdout.split())
    a_block = 2**26 / 4096  # its pages; fewer faults where the system has larger ones
    assert inside < a_block / 100
    assert before > 10 * max(inside, 1)
    assert after > before / 2


def test_the_way_back_is_taken_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(freed_memory, "_of_glibc", lambda name: lambda *given: asked.append(given))

    def fail() -> None:
        with keeping_freed_memory():
            assert asked == list(KEEPING.items())
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert asked[len(KEEPING) :] == list(RETURNING.items())


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with keeping_freed_memory():
        return_freed_memory()
