"""The table of what is stood in for: names by module, and what each package needs to be whole."""

from types import MappingProxyType
from typing import Any

from ptq4vm.authors import convolutions, extensions, mamba, mamba_inner, norms, scans
from ptq4vm.authors.refusals import BACKWARD, MAMBA2, STEPS, refused


def _refuse(module: str, reason: str, *names: str) -> dict[str, Any]:
    return {name: refused(f"{module}.{name}", reason) for name in names}


def _extension(module: str, fwd: Any) -> dict[str, Any]:
    return {"fwd": fwd, **_refuse(module, BACKWARD, "bwd")}


EXTENSIONS = MappingProxyType(
    {
        "mamba_ssm": "selective_scan_cuda",
        "causal_conv1d": "causal_conv1d_cuda",
        "Dwconv": "dwconv2d",
        **{
            name: name
            for name in (
                "selective_scan_cuda",
                "selective_scan_cuda_core",
                "selective_scan_cuda_ndstate",
                "selective_scan_cuda_nrow",
                "selective_scan_cuda_oflex",
                "selective_scan_cuda_oflex_rh",
                "selective_scan",
                "selective_scan_vmamba",
                "selective_scan_vmamba_pt202",
                "causal_conv1d_cuda",
                "dwconv2d",
            )
        },
    }
)
"""Packages, and the compiled module without which each counts as absent."""

_NORMS = {"RMSNorm": norms.RMSNorm, "rms_norm_fn": norms.rms_norm_fn, "layer_norm_fn": norms.layer_norm_fn}
_TRITON = "mamba_ssm.ops.triton"
_INNER = {
    "selective_scan_fn": scans.selective_scan_fn,
    "mamba_inner_fn": mamba_inner.mamba_inner_fn,
}
_CONV1D = {
    "causal_conv1d_fn": convolutions.causal_conv1d_fn,
    **_refuse("causal_conv1d", STEPS, "causal_conv1d_update"),
}
_SCAN_PACKAGE = {
    "selective_scan_fn": scans.selective_scan_without_gate,
    "selective_scan_ref": scans.selective_scan_without_gate,
}

STAND_INS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "mamba_ssm": {
            **_INNER,
            "Mamba": mamba.Mamba,
            **_refuse("mamba_ssm", MAMBA2, "Mamba2", "Mamba3", "MambaLMHeadModel"),
        },
        "mamba_ssm.models": {},
        "mamba_ssm.models.mixer_seq_simple": _refuse(
            "mamba_ssm.models.mixer_seq_simple", STEPS, "MambaLMHeadModel", "MixerModel", "create_block"
        ),
        "mamba_ssm.modules": {},
        "mamba_ssm.modules.mamba_simple": {
            "Mamba": mamba.Mamba,
            **_refuse("mamba_ssm.modules.mamba_simple", "write the residual block in your model", "Block"),
        },
        "mamba_ssm.modules.mamba2": _refuse("mamba_ssm.modules.mamba2", MAMBA2, "Mamba2"),
        "mamba_ssm.modules.mamba2_simple": _refuse("mamba_ssm.modules.mamba2_simple", MAMBA2, "Mamba2Simple"),
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {
            **_INNER,
            "selective_scan_ref": scans.selective_scan_fn,
            "mamba_inner_ref": mamba_inner.mamba_inner_fn,
            "mamba_inner_fn_no_out_proj": mamba_inner.mamba_inner_fn_no_out_proj,
            "bimamba_inner_fn": mamba_inner.bimamba_inner_fn,
            "bimamba_inner_ref": mamba_inner.bimamba_inner_fn,
        },
        _TRITON: {},
        f"{_TRITON}.layernorm": _NORMS,
        f"{_TRITON}.layer_norm": _NORMS,
        f"{_TRITON}.layernorm_gated": _refuse(
            f"{_TRITON}.layernorm_gated", MAMBA2, "LayerNorm", "RMSNorm", "layernorm_fn", "rmsnorm_fn"
        ),
        f"{_TRITON}.selective_state_update": _refuse(
            f"{_TRITON}.selective_state_update", STEPS, "selective_state_update"
        ),
        f"{_TRITON}.ssd_combined": _refuse(
            f"{_TRITON}.ssd_combined", MAMBA2, "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"
        ),
        f"{_TRITON}.mamba3": {},
        f"{_TRITON}.mamba3.mamba3_siso_combined": _refuse(
            f"{_TRITON}.mamba3.mamba3_siso_combined", MAMBA2, "mamba3_siso_combined"
        ),
        f"{_TRITON}.mamba3.mamba3_mimo_rotary_step": _refuse(
            f"{_TRITON}.mamba3.mamba3_mimo_rotary_step", STEPS, "apply_rotary_qk_inference_fwd"
        ),
        "mamba_ssm.utils": {},
        "mamba_ssm.utils.generation": _refuse("mamba_ssm.utils.generation", STEPS, "GenerationMixin"),
        "mamba_ssm.utils.hf": _refuse(
            "mamba_ssm.utils.hf", "read the file with torch.load", "load_config_hf", "load_state_dict_hf"
        ),
        "causal_conv1d": _CONV1D,
        "causal_conv1d.causal_conv1d_interface": _CONV1D,
        "causal_conv1d.cpp_functions": {
            "causal_conv1d_fwd_function": convolutions.causal_conv1d_fwd,
            **_refuse(
                "causal_conv1d.cpp_functions", BACKWARD, "causal_conv1d_bwd_function", "causal_conv1d_update_function"
            ),
        },
        "causal_conv1d.causal_conv1d_varlen": _refuse(
            "causal_conv1d.causal_conv1d_varlen", MAMBA2, "causal_conv1d_varlen_states"
        ),
        "causal_conv1d_cuda": {
            "causal_conv1d_fwd": convolutions.causal_conv1d_fwd,
            **_refuse("causal_conv1d_cuda", BACKWARD, "causal_conv1d_bwd", "causal_conv1d_update"),
        },
        "selective_scan_cuda": _extension("selective_scan_cuda", extensions.mamba_fwd),
        "selective_scan_cuda_core": _extension("selective_scan_cuda_core", extensions.core_fwd),
        "selective_scan_cuda_nrow": _extension("selective_scan_cuda_nrow", extensions.core_fwd),
        "selective_scan_cuda_ndstate": _extension("selective_scan_cuda_ndstate", extensions.core_fwd),
        "selective_scan_cuda_oflex": _extension("selective_scan_cuda_oflex", extensions.oflex_fwd),
        "selective_scan_cuda_oflex_rh": _extension("selective_scan_cuda_oflex_rh", extensions.oflex_states_fwd),
        "selective_scan": _SCAN_PACKAGE,
        "selective_scan.selective_scan_interface": _SCAN_PACKAGE,
        **{
            f"{package}{module}": names
            for package in ("selective_scan_vmamba", "selective_scan_vmamba_pt202")
            for module, names in (
                ("", _SCAN_PACKAGE),
                (".selective_scan_cuda_core", _extension(f"{package}.selective_scan_cuda_core", extensions.core_fwd)),
            )
        },
        "Dwconv": {},
        "Dwconv.dwconv_layer": {
            "DepthwiseFunction": convolutions.DepthwiseFunction,
            "DwConv2d": convolutions.DwConv2d,
        },
        "dwconv2d": {
            "dwconv2d_fp32": convolutions.dwconv2d_fp32,
            "dwconv2dbias_fp32": convolutions.dwconv2dbias_fp32,
            **_refuse("dwconv2d", BACKWARD, "dwconv2d_fp32_dgrad", "dwconv2d_fp32_wgrad", "dwconv2d_fp32_bgrad"),
        },
    }
)
"""Modules, and the names in each."""

NEEDS_EXTENSION = ("causal_conv1d", "mamba_ssm.ops.selective_scan_interface", _TRITON)
"""Modules of a Python package without its extension that are replaced even where their file is there."""
