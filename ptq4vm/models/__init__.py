"""Visual Mamba models with the parameter names of their public checkpoints.

Importing this package adds the models to timm's registry:

    >>> import timm, ptq4vm.models
    >>> model = timm.create_model("vim_nano_patch4_32.digits", pretrained=True)
"""

from ptq4vm.models.local_vim import LocalVim
from ptq4vm.models.local_vmamba import LocalVMamba
from ptq4vm.models.vim import Vim
from ptq4vm.models.vmamba import VMamba

__all__ = ["LocalVMamba", "LocalVim", "VMamba", "Vim"]
