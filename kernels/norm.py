"""The norm before the products of a layer (Zhang and Sennrich, arXiv 1910.07467).

    rms_norm   x / sqrt(mean(x^2) + eps) * weight

Inside is float32, rounded once. Cost: the bytes of the rows once each way; in torch it is ten operators,
whose calls cost a decode step more than their arithmetic. Limits: none in torch; C++ serves float32 and
bfloat16.
"""

from __future__ import annotations

from torch import Tensor

from agentctx.kernels import checks, choose


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, impl: str | None = None) -> Tensor:
    """Normalise x `[..., H]` by its root mean square and scale it by weight `[H]`, in the dtype of both.

    Raises ValueError for shapes, dtypes or devices that do not fit, TypeError for no tensors.
    """
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        raise TypeError(f"x is {type(x).__name__}, weight {type(weight).__name__}: tensors are needed")
    checks.floats("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x is {list(x.shape)}: rows of one element or more are needed")
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype or weight.device != x.device:
        came = f"{weight.dtype} {list(weight.shape)} on {weight.device}"
        raise ValueError(f"weight is {came}: {x.dtype} {list(x.shape[-1:])} on {x.device} is needed")
    if eps < 0:
        raise ValueError(f"eps is {eps}: 0 or more is needed")
    found: Tensor = choose.run("rms_norm", impl, x.device, x, weight, float(eps))
    return found
