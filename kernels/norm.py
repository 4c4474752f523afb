"""What happens to each token between the products of a layer: the norm before, the gate inside.

    rms_norm   x / sqrt(mean(x^2) + eps) * weight          (Zhang and Sennrich, arXiv 1910.07467)
    silu_gate  silu(gate) * up, for rows [gate, up]        (SwiGLU, Shazeer, arXiv 2002.05202)

Inside is float32, rounded once. Cost: the bytes of the rows once each way and a few FLOP an element; in torch
each is several operators, whose calls cost a decode step more than their arithmetic. Limits: none in torch;
C++ serves float32 and bfloat16.
"""

from __future__ import annotations

from torch import Tensor

from agentctx.kernels import checks, choose


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, impl: str | None = None) -> Tensor:
    """Normalise x `[..., H]` by its root mean square and scale it by weight `[H]`, in the dtype of both.

    Raises ValueError for shapes, dtypes or devices that do not fit, TypeError for no tensors.
    """
    _rows("x", x)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is {type(weight).__name__}: a tensor is needed")
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype or weight.device != x.device:
        came = f"{weight.dtype} {list(weight.shape)} on {weight.device}"
        raise ValueError(f"weight is {came}: {x.dtype} {list(x.shape[-1:])} on {x.device} is needed")
    if eps < 0:
        raise ValueError(f"eps is {eps}: 0 or more is needed")
    found: Tensor = choose.run("rms_norm", impl, x.device, x, weight, float(eps))
    return found


def silu_gate(x: Tensor, *, impl: str | None = None) -> Tensor:
    """x `[..., 2 F]`, gate and up side by side, to `[..., F]`.

    Raises ValueError for an odd last dimension or a dtype that does not fit, TypeError for no tensor.
    """
    _rows("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x is {list(x.shape)}: an even last dimension is needed")
    found: Tensor = choose.run("silu_gate", impl, x.device, x)
    return found


def _rows(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}: a tensor is needed")
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name} is {list(value.shape)}: rows of one element or more are needed")
    checks.floats(name, value)
