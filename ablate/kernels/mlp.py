"""The feed-forward layer with GELU (arXiv:1606.08415) or SwiGLU (arXiv:2002.05202) between its
matrices, as one operation.

On Hopper the activation and its gradient are computed where a product leaves its tiles in
registers, instead of in passes of their own over the widest tensors of a model (`products_gluon`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ablate.kernels.dispatch import ALIGN, use_triton
from ablate.kernels.gelu import gelu
from ablate.kernels.linear import linear
from ablate.kernels.swiglu import swiglu

LEAST_ROWS = 4096
"""below which the fused products leave too many multiprocessors without a tile"""


def mlp(
    x: Tensor, w_in_ED: Tensor, w_out_OH: Tensor, *, gated: bool = False, backend: str | None = None
) -> Tensor:
    """act(x w_in^T) w_out^T, act GELU or, gated, SwiGLU; in the dtype that `F.linear` would give.

    The hidden layer is rounded to that dtype before the activation and after it, in every form.

    Args:
        x: (..., D), any leading axes. Under autocast everything but float64 is rounded to its
            dtype, as by `F.linear`; the gradients of float32 weights are float32, on a GPU from
            their products themselves.
        w_in_ED, w_out_OH: the two matrices, as `F.linear` takes them; E is H or, gated, 2 H, gates
            first.
        backend: None chooses; "triton" (float16, bfloat16 and, in the interpreter, float32; widths
            of whole 16 bytes) or "reference" insist. Elsewhere than on sm_90 with a Triton that the
            fused kernels were tested with, "triton" is torch's products and the kernels of `gelu`
            and `swiglu`.

    Raises:
        ValueError: the widths do not fit, or the named backend cannot run the case.
    """
    hidden = w_out_OH.shape[1]
    if x.shape[-1] != w_in_ED.shape[1] or w_in_ED.shape[0] != hidden * (1 + gated):
        raise ValueError(
            f"x ends in {x.shape[-1]}, w_in is {tuple(w_in_ED.shape)} and w_out "
            f"{tuple(w_out_OH.shape)}; they must be (..., D), ({'2 H' if gated else 'H'}, D) and "
            "(O, H)"
        )
    device = x.device.type
    mixed = torch.is_autocast_enabled(device)
    if mixed and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    weights = {torch.float32, x.dtype} if mixed else {x.dtype}
    fits = w_in_ED.dtype == w_out_OH.dtype and w_in_ED.dtype in weights
    supported = fits and _supported(x, w_in_ED, w_out_OH, backend)
    if use_triton(backend, x, w_in_ED, w_out_OH, supported=supported):
        from ablate.kernels.mlp_triton import mlp_triton

        return mlp_triton(x, w_in_ED, w_out_OH, gated)
    act = swiglu if gated else gelu
    return linear(act(linear(x, w_in_ED), backend=backend), w_out_OH)


def _supported(x: Tensor, w_in_ED: Tensor, w_out_OH: Tensor, backend: str | None) -> bool:
    """Whether the kernels take the case, and, unless they are asked for, also gain by it."""
    fits = not any(width % ALIGN for width in (*w_in_ED.shape, *w_out_OH.shape))
    if not fits or not x.is_cuda:
        return fits
    half = x.dtype in (torch.float16, torch.bfloat16)
    return half and (backend == "triton" or x.numel() >= LEAST_ROWS * x.shape[-1])
