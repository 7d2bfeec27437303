import pytest
import torch

from tokenwise.comparison.worker import is_out_of_memory, reason_of
from tokenwise.errors import InputError, Problem


def real_cpu_out_of_memory():
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return error
    raise AssertionError("a petabyte was allocated")


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), real_cpu_out_of_memory()]
)
def test_running_out_of_memory_is_recognised(error):
    assert is_out_of_memory(error)
    assert reason_of(error).startswith("Out of memory: ")


def test_other_reasons_are_one_line_with_the_kind_of_error():
    assert reason_of(ValueError("two\nlines")) == "ValueError: two lines"
    assert reason_of(KeyError()) == "KeyError"
    assert reason_of(InputError(Problem("task", "is wrong.", "Mend it."))) == "task: is wrong. Mend it."
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
