"""`mamba_ssm.Mamba`, the first version: the names of its parameters, on this package's operators."""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ptq4vm.authors.mamba_inner import mamba_inner_fn
from ptq4vm.authors.refusals import STEPS, refuse_arguments


class Mamba(nn.Module):
    """Mamba's mixer, (B, L, D) → (B, L, D), with the arguments of `mamba_ssm.Mamba`.

    Its state dict is that of the original, and its initial values are drawn in the same order.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **of_forks: Any,
    ) -> None:
        super().__init__()
        if of_forks:
            raise TypeError(
                f"mamba_ssm.Mamba has no argument {', '.join(of_forks)}, which a fork's has: put the folder of that "
                "fork, such as Vim's mamba-1p1p1, on sys.path; its Python files are used as they are"
            )
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path, self.layer_idx, self.activation = use_fast_path, layer_idx, "silu"
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **kind)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, padding=d_conv - 1, groups=self.d_inner, bias=conv_bias, **kind
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **kind)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **kind)
        self._initialize_dt(dt_init, dt_scale * self.dt_rank**-0.5, dt_min, dt_max, dt_init_floor)
        states = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(states.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **kind)

    def _initialize_dt(self, init: str, bound: float, smallest: float, largest: float, floor: float) -> None:
        """Sets the projection's weights, and its bias to the inverse softplus of steps between two bounds."""
        if init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        elif init == "random":
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        else:
            raise NotImplementedError(f"dt_init must be 'constant' or 'random', got {init!r}")
        bias = self.dt_proj.bias
        with torch.no_grad():
            drawn = torch.rand_like(bias) * (math.log(largest) - math.log(smallest)) + math.log(smallest)
            dt = drawn.exp().clamp(min=floor)
            bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, hidden_states: Tensor, inference_params: object = None) -> Tensor:
        refuse_arguments("mamba_ssm.Mamba", STEPS, inference_params=inference_params)
        return mamba_inner_fn(
            self.in_proj(hidden_states).transpose(1, 2),
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            -torch.exp(self.A_log.float()),
            D=self.D.float(),
            delta_bias=self.dt_proj.bias.float(),
        )

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"ptq4vm's stand-in for mamba_ssm.Mamba has no step: {STEPS}")
