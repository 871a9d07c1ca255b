"""Visual Mamba models with the parameter names of their public checkpoints.

Importing this package adds the models to timm's registry:

    >>> import timm, ptq4vm.models
    >>> model = timm.create_model("vim_nano_patch4_32.digits", pretrained=True)

A name that an author's repository has registered with timm too, such as `local_vim_tiny`, is that repository's in timm,
whichever is imported first; `create_model` of this package knows its own models alone by their names:

    >>> model = ptq4vm.models.create_model("vim_nano_patch4_32.digits", pretrained=True)
"""

from ptq4vm.models.local_vim import LocalVim
from ptq4vm.models.local_vmamba import LocalVMamba
from ptq4vm.models.mamba_vision import MambaVision
from ptq4vm.models.quantized import quantized_by_ptq4vm as quantized_by_ptq4vm  # timm finds it
from ptq4vm.models.registry import create_model
from ptq4vm.models.vim import Vim
from ptq4vm.models.vmamba import VMamba

__all__ = ["LocalVMamba", "LocalVim", "MambaVision", "VMamba", "Vim", "create_model"]
