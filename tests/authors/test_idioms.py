"""Models written as the authors of fifteen repositories write theirs, along the whole road."""

import pytest
import torch
from helpers.authors_models.dense import MambaIR, MambaIRv2, VMUNet
from helpers.authors_models.hybrids import EfficientViM, MambaVision, SpatialMamba
from helpers.authors_models.isotropic import LocalVim, MambaStack, PlainMamba, Vim
from helpers.authors_models.parts_of_maps import EfficientVMamba, GroupMamba, MSVMamba
from helpers.authors_models.vmamba import LocalVMamba, VMamba
from helpers.strategies import normal
from helpers.whole_road import travelled
from torch import nn
from torch.utils._pytree import tree_leaves

import ptq4vm
from ptq4vm.authors import stand_ins
from ptq4vm.metadata import metadata_of
from ptq4vm.passes.lower.fuse import fusions

MODELS = (
    *(Vim, LocalVim, VMamba, LocalVMamba, MambaVision, MambaStack, EfficientVMamba, GroupMamba, MSVMamba),
    *(SpatialMamba, VMUNet, PlainMamba, EfficientViM, MambaIR, MambaIRv2),
)
FUSED = (Vim, LocalVim, VMamba, LocalVMamba)


FAST = ("Vim", "VMamba", "LocalVim", "EfficientViM", "PlainMamba")


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize(
    "kind", [kind if kind.__name__ in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
def test_every_product_of_tokens_is_quantized(kind, tmp_path):
    model, images = made(kind), normal(3, *kind.images)
    with stand_ins():  # VMamba opens the CUDA device of a CPU's tensor
        quantized = travelled(model, images, ptq4vm.QuantConfig(), tmp_path, model_for_load=None)
    assert {linear.name for linear in metadata_of(quantized).linears} == set(kind.linears)
    fused = ptq4vm.fuse(quantized)
    left = [place for place in fusions(fused) if place.skip_reason is not None and "mean" not in place.skip_reason]
    assert left == [] or kind not in FUSED, left
    for value, wanted in zip(tree_leaves(fused(images)), tree_leaves(quantized(images)), strict=True):
        assert (value - wanted).abs().max() <= 0.05 * wanted.std()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_compiled_models_compute_the_same(kind):
    images = normal(3, *kind.images)
    with stand_ins():
        quantized = ptq4vm.quantize(made(kind), [images[:2]], progress=False)
    compiled = torch.compile(quantized, backend="ptq4vm")
    for value, wanted in zip(tree_leaves(compiled(images)), tree_leaves(ptq4vm.fuse(quantized)(images)), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
