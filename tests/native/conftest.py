"""Every instruction set of this machine."""

import pytest
import torch
from helpers.draws import available

from ptq4vm.backend import native


@pytest.fixture(params=available() or [None])
def isa(request):
    """Runs the test on one instruction set."""
    if request.param is None:
        pytest.skip(str(native.unavailable_reason()))
    before = native.isa()
    assert torch.ops.ptq4vm._use_isa(request.param) == request.param
    yield request.param
    torch.ops.ptq4vm._use_isa(before)
