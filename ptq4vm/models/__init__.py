"""Visual Mamba models with their public parameter names. Importing this package adds them to timm's registry.

import timm, ptq4vm.models
model = timm.create_model("vim_tiny_patch16_224", checkpoint_path="vim_t_midclstok_76p1acc.pth")
"""

from ptq4vm.models.local_vim import LocalVim
from ptq4vm.models.local_vmamba import LocalVMamba
from ptq4vm.models.vim import Vim
from ptq4vm.models.vmamba import VMamba

__all__ = ["LocalVMamba", "LocalVim", "VMamba", "Vim"]
