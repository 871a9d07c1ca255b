"""Shapes that do not fit are named, with the way out."""

import pytest
import torch
from helpers.operator_inputs import linear_inputs

from ptq4vm import ops


@pytest.mark.parametrize("meta", [False, True])
def test_another_token_count_is_an_error_that_names_both_and_the_way_out(meta):
    device = torch.device("meta" if meta else "cpu")
    message = (
        "token scales were calibrated for 5 tokens, the input has 7; "
        "calibrate at this resolution or use Granularity.PER_TENSOR"
    )
    scale, zero_point = torch.ones(5, device=device), torch.zeros(5, dtype=torch.int32, device=device)
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.quantize(torch.zeros(2, 7, 3, device=device), scale, zero_point, None, 8)
    weight, weight_scale = torch.zeros(4, 3, dtype=torch.int8, device=device), torch.ones(4, device=device)
    with pytest.raises((ValueError, RuntimeError), match=message):
        codes = torch.zeros(2, 7, 3, dtype=torch.int8, device=device)
        ops.linear(codes, scale, zero_point, weight, weight_scale, None, torch.float32)


def test_scales_for_other_images_are_an_error():
    with pytest.raises(
        (ValueError, RuntimeError), match=r"scales of shape .* do not fit an input|scales do not fit the input"
    ):
        ops.quantize(torch.zeros(2, 7, 3), torch.ones(3, 7), torch.zeros(3, 7, dtype=torch.int32), None, 8)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("dtype", "columns", "message"),
    [
        (torch.uint8, 2, "a packed 4-bit weight for 5 channels has 3 columns, this one 2"),
        (torch.uint8, 5, "a packed 4-bit weight for 5 channels has 3 columns, this one 5"),
        (torch.int8, 3, "a int8 weight for 5 channels has 5 columns, this one 3"),
    ],
)
def test_a_weight_of_another_width_is_an_error(dtype, columns, message, meta):
    x_q, scale, zero_point, _, weight_scale, bias, out = linear_inputs()
    weight = torch.zeros(4, columns, dtype=dtype)
    inputs = (x_q, scale, zero_point, weight, weight_scale, bias)
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.linear(*(value.to("meta" if meta else "cpu") for value in inputs), out)
