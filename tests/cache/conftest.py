"""What all tests of the cache share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield
