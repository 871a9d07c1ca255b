"""Compiles what an operator launches for a GPU that is not here, and reads the machine code."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptq4vm.backend.triton import MODULES, common, run

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


@dataclass
class Compiled:
    sass: str = field(repr=False)
    registers: int
    local: int
    """Bytes of local memory: stack and spills."""


def compile_operator(name: str, *arguments: Any, capability: int, folder: Any, monkeypatch: Any) -> Compiled:
    """The kernel that `name` launches with these arguments; tensors may be on the device `meta`."""
    launches: list[tuple] = []
    module = __import__(f"ptq4vm.backend.triton.{MODULES[name]}", fromlist=["launch"])
    with monkeypatch.context() as patch:
        patch.setattr(module, "launch", lambda *given, **options: launches.append((given, options)))
        run(name, *arguments)
    ((kernel, _, *values), options) = launches[0][0], dict(launches[0][1])
    assert len(launches) == 1
    settings = {"num_warps": options.pop("warps", 4), "num_stages": options.pop("stages", 3)}
    signature, constants, aligned = {}, dict(options), {}
    for i, (parameter, value) in enumerate(zip(kernel.params, values, strict=False)):
        signature[parameter.name] = _type(value, not parameter.do_not_specialize)
        if signature[parameter.name] == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor) or (
            isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        ):
            aligned[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(options, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={**settings, **common.ROUNDING})
    cubin = folder / f"{name}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    sass, usage = (
        subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
        for flag in ("-sass", "-res-usage")
    )
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups())
    return Compiled(sass, registers, stack + local)


def _type(value: Any, specialized: bool) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if value is None or (specialized and type(value) is int and value == 1):
        return "constexpr"
    return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
