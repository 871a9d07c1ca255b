"""Repositories of Visual Mambas, as data: where they are, how a model of each is imported and made, what it takes.

Paths are inside the folder of clones; the clones' folders have the repositories' own names. A model is made small
enough for a CPU: few blocks at the published widths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Repository:
    """How to make one model of one repository."""

    url: str
    model: str
    """`module:attribute` of the class or function that makes the model."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of `model`; a dictionary in it may have the keys of a class that it makes itself."""
    shape: tuple[int, ...] = (3, 224, 224)
    paths: tuple[str, ...] = ()
    """Folders for `sys.path`."""
    bare: tuple[str, ...] = ()
    """Packages whose `__init__` imports what the model does not need, so it is not run."""
    stubs: tuple[str, ...] = ()
    """Packages that are not installed and that the model needs by name alone, or little of (`authors_stubs.py`)."""
    output: int | None = None
    """Which of several results to take."""

    @property
    def clone(self) -> str:
        return self.url.rpartition("/")[2]


_VMAMBA: dict[str, Any] = {
    "dims": 96,
    "ssm_d_state": 1,
    "ssm_conv_bias": False,
    "ssm_init": "v0",
    "forward_type": "v05_noz",
}
_VMAMBA |= {"norm_layer": "ln2d", "downsample_version": "v3", "patchembed_version": "v2"}
_LOCAL = [["h", "v_flip", "w7", "w7_flip"], ["h_flip", "w2_flip", "w7", "w2"]]
_VIM: dict[str, Any] = {
    "embed_dim": 192,
    "depth": 2,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
}
_VIM |= {"final_pool_type": "mean", "if_abs_pos_embed": True, "bimamba_type": "v2"}
_PLAIN_MIXER: dict[str, Any] = {"d_state": 16, "expand": 2, "conv_size": 7, "conv_bias": True, "bias": True}

REPOSITORIES = {
    "vim": Repository(
        url="https://github.com/hustvl/Vim",
        model="models_mamba:VisionMamba",
        arguments=_VIM | {"if_cls_token": True, "if_divide_out": True, "use_middle_cls_token": True},
        paths=("Vim/vim", "Vim/mamba-1p1p1"),
    ),
    "local_vim": Repository(
        url="https://github.com/hunto/LocalMamba",
        model="lib.models.local_vim:VisionMamba",
        arguments=_VIM | {"if_rope": True, "if_rope_residual": True, "directions": _LOCAL},
        paths=("LocalMamba/classification", "LocalMamba/mamba-1p1p1"),
        bare=("lib", "lib.models"),
    ),
    "vmamba": Repository(
        url="https://github.com/MzeroMiko/VMamba",
        model="models.vmamba:VSSM",
        arguments=_VMAMBA | {"depths": [1, 1, 1, 1], "ssm_ratio": 1.0},
        shape=(3, 64, 64),
        paths=("VMamba/classification",),
    ),
    "local_vmamba": Repository(
        url="https://github.com/hunto/LocalMamba",
        model="lib.models.local_vmamba:VSSM",
        arguments={"dims": [96, 192, 384, 768], "depths": [1, 1, 1, 1], "directions": [*_LOCAL, *_LOCAL]},
        paths=("LocalMamba/classification", "LocalMamba/mamba-1p1p1"),
        bare=("lib", "lib.models"),
    ),
    "mambavision": Repository(
        url="https://github.com/NVlabs/MambaVision",
        model="mambavision.models.mamba_vision:MambaVision",
        arguments={
            "dim": 80,
            "in_dim": 32,
            "depths": [1, 1, 2, 2],
            "window_size": [8, 8, 14, 7],
            "mlp_ratio": 4,
            "num_heads": [2, 4, 8, 16],
        },
        paths=("MambaVision",),
        bare=("mambavision", "mambavision.models"),
    ),
    "mamba": Repository(
        url="https://github.com/state-spaces/mamba",
        model="benchmarks.authors_stubs:MambaClassifier",
        paths=("mamba",),
    ),
    "efficient_vmamba": Repository(
        url="https://github.com/TerryPei/EfficientVMamba",
        model="models.vmamba_efficient:EfficientVSSM",
        arguments={
            "dims": 48,
            "depths": [1, 1, 1, 1],
            "mlp_ratio": 0.0,
            "downsample_version": "v1",
            "window_size": 2,
        },
        shape=(3, 64, 64),
        paths=("EfficientVMamba/classification",),
        bare=("models", "lib", "lib.models"),
    ),
    "groupmamba": Repository(
        url="https://github.com/Amshaker/GroupMamba",
        model="models.groupmamba:GroupMamba",
        arguments={"depths": [1, 1, 1, 1], "distillation": False},
        shape=(3, 64, 64),
        paths=("GroupMamba/classification",),
    ),
    "msvmamba": Repository(
        url="https://github.com/YuHengsss/MSVMamba",
        model="models.vmamba:VSSM",
        arguments={
            "dims": 96,
            "depths": [1, 1, 1, 1],
            "ssm_d_state": 1,
            "mlp_ratio": 0.0,
            "downsample_version": "v1",
            "patchembed_version": "v1",
            "convFFN": True,
            "add_se": True,
            "sscore_type": "multiscale_4scan_12",
            "ffn_dropout": 0.0,
            "recurrent": False,
            "inter_block_ssm": False,
            "grid_size": 0,
            "multiscale_ratio": [],
            "multiscale_ksize": [],
            "continous_patch": False,
            "adaptive_merge": False,
            "add_conv": True,
            "b1_seq": False,
            "b1_ratio": 0.5,
            "ms_fusion": None,
            "up_sample": "interpolate",
            "lpu": False,
            "sep_norm": False,
            "ms_stage": [0, 1, 2, 3],
            "ms_split": [1, 3],
        },
        shape=(3, 64, 64),
        paths=("MSVMamba/classification",),
    ),
    "spatial_mamba": Repository(
        url="https://github.com/EdwardChasel/Spatial-Mamba",
        model="models.spatialmamba:SpatialMamba",
        arguments={"dims": 64, "depths": [1, 1, 1, 1]},
        shape=(3, 64, 64),
        paths=("Spatial-Mamba/classification", "Spatial-Mamba/kernels/dwconv2d"),
        bare=("models",),
    ),
    "vm_unet": Repository(
        url="https://github.com/JCruan519/VM-UNet",
        model="models.vmunet.vmunet:VMUNet",
        arguments={"num_classes": 1, "depths": [1, 1, 1, 1], "depths_decoder": [1, 1, 1, 1]},
        shape=(3, 64, 64),
        paths=("VM-UNet",),
        bare=("models", "models.vmunet"),
    ),
    "plain_mamba": Repository(
        url="https://github.com/ChenhongyiYang/PlainMamba",
        model="mmcls.plain_mamba_dev.models.plain_mamba.plain_mamba:PlainMamba",
        arguments={
            "num_layers": 2,
            "embed_dims": 192,
            "layers_with_dwconv": [0],
            "layer_cfgs": {"use_rms_norm": False, "mamba_cfg": {**_PLAIN_MIXER, "default_hw_shape": (14, 14)}},
        },
        paths=("PlainMamba",),
        bare=(
            "mmcls",
            "mmcls.models",
            "mmcls.models.backbones",
            "mmcls.plain_mamba_dev",
            "mmcls.plain_mamba_dev.models",
            "mmcls.plain_mamba_dev.models.modules",
            "mmcls.plain_mamba_dev.models.plain_mamba",
        ),
        stubs=("mmcv", "mmcls.models.builder", "mmcls.models.utils"),
        output=0,
    ),
    "efficientvim": Repository(
        url="https://github.com/mlvlab/EfficientViM",
        model="models.EfficientViM:EfficientViM",
        arguments={"embed_dim": [128, 192, 320], "depths": [1, 1, 1]},
        paths=("EfficientViM/classification",),
        bare=("models",),
    ),
    "mambair": Repository(
        url="https://github.com/csguoh/MambaIR",
        model="basicsr.archs.mambair_arch:MambaIR",
        arguments={"embed_dim": 60, "depths": [1, 1], "mlp_ratio": 1.2, "upsampler": "pixelshuffledirect"},
        shape=(3, 64, 64),
        paths=("MambaIR",),
        bare=("basicsr", "basicsr.archs"),
        stubs=("basicsr.utils",),
    ),
    "mambairv2": Repository(
        url="https://github.com/csguoh/MambaIR",
        model="basicsr.archs.mambairv2_arch:MambaIRv2",
        arguments={
            "embed_dim": 48,
            "depths": [1, 1],
            "num_heads": [4, 4],
            "mlp_ratio": 1.0,
            "upsampler": "pixelshuffledirect",
        },
        shape=(3, 64, 64),
        paths=("MambaIR",),
        bare=("basicsr", "basicsr.archs"),
        stubs=("basicsr.utils",),
    ),
}
"""In the order of the table."""
