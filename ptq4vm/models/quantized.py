"""Lets `timm.create_model("hf-hub:org/name")` load a quantized model that `ptq4vm.push_to_hub` uploaded."""

from typing import Any

from timm.models import register_model

from ptq4vm.models.registry import NOT_ARCHITECTURE

_SOURCES = ("hf_hub_id", "source", "file")
_FROM_TIMM = (*NOT_ARCHITECTURE, "pretrained_model_args")
"""Arguments that `timm.create_model` adds itself."""


@register_model
def quantized_by_ptq4vm(pretrained: bool = False, **options: Any) -> Any:
    """Returns the quantized model, whatever `pretrained` says: there is none of other weights.

    Raises ValueError without a repository or folder, and for arguments, which would make another model.
    """
    import ptq4vm

    cfg: Any = options.get("pretrained_cfg")
    cfg = dict(cfg) if isinstance(cfg, dict) else {}
    name = f"hf-hub:{cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else cfg.get("file")
    if name is None:
        raise ValueError("quantized models have no architecture of their own: timm.create_model('hf-hub:org/name')")
    if options.get("cache_dir") is not None:
        raise ValueError(f"{name} is read from the cache that HF_HOME names: leave cache_dir out, or set HF_HOME")
    if given := [key for key, value in options.items() if key not in _FROM_TIMM and value is not None]:
        raise ValueError(
            f"{name} is quantized and cannot be changed by {', '.join(given)}: leave that out, or quantize the "
            "floating-point model that you want"
        )
    model: Any = ptq4vm.load(name)
    model.pretrained_cfg = {key: value for key, value in cfg.items() if key not in _SOURCES and value is not None}
    if "num_classes" in model.pretrained_cfg:
        model.num_classes = model.pretrained_cfg["num_classes"]
    return model
