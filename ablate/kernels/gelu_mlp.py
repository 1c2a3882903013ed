"""The feed-forward layer with GELU (arXiv:1606.08415) between its two matrices, as one operation.

On Hopper the activation and its gradient are computed where a product leaves its tiles in
registers, instead of in passes of their own over the widest tensors of a Transformer
(`gelu_mlp_gluon`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ablate.kernels.dispatch import ALIGN, use_triton
from ablate.kernels.gelu import gelu
from ablate.kernels.linear import linear

LEAST_ROWS = 4096
"""below which the fused products leave too many multiprocessors without a tile"""


def gelu_mlp(x: Tensor, w_in_HD: Tensor, w_out_DH: Tensor, *, backend: str | None = None) -> Tensor:
    """gelu(x w_in^T) w_out^T, in the dtype that `F.linear` would give.

    The hidden layer is rounded to that dtype before GELU and after it, in every form.

    Args:
        x: (..., D), any leading axes. Under autocast everything but float64 is rounded to its
            dtype, as by `F.linear`; the gradients of float32 weights are float32, on a GPU from
            their products themselves.
        w_in_HD, w_out_DH: the two matrices, as `F.linear` takes them; O, the rows of the second,
            need not be D.
        backend: None chooses; "triton" (float16, bfloat16 and, in the interpreter, float32; widths
            of whole 16 bytes) or "reference" insist. Elsewhere than on sm_90 with a Triton that the
            fused kernels were tested with, "triton" is torch's products and the kernels of `gelu`.

    Raises:
        ValueError: the widths do not fit, or the named backend cannot run the case.
    """
    if x.shape[-1] != w_in_HD.shape[1] or w_in_HD.shape[0] != w_out_DH.shape[1]:
        raise ValueError(
            f"x ends in {x.shape[-1]}, w_in is {tuple(w_in_HD.shape)} and w_out "
            f"{tuple(w_out_DH.shape)}; they must be (..., D), (H, D) and (D, H)"
        )
    device = x.device.type
    mixed = torch.is_autocast_enabled(device)
    if mixed and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    weights = {torch.float32, x.dtype} if mixed else {x.dtype}
    fits = w_in_HD.dtype == w_out_DH.dtype and w_in_HD.dtype in weights
    supported = fits and _supported(x, w_in_HD, w_out_DH, backend)
    if use_triton(backend, x, w_in_HD, w_out_DH, supported=supported):
        from ablate.kernels.gelu_mlp_triton import gelu_mlp_triton

        return gelu_mlp_triton(x, w_in_HD, w_out_DH)
    return linear(gelu(linear(x, w_in_HD), backend=backend), w_out_DH)


def _supported(x: Tensor, w_in_HD: Tensor, w_out_DH: Tensor, backend: str | None) -> bool:
    """Whether the kernels take the case, and, unless they are asked for, also gain by it."""
    fits = (
        x.dtype != torch.float64
        and x.numel() > 0
        and not any(width % ALIGN for width in (*w_in_HD.shape, *w_out_DH.shape))
    )
    if not fits or not x.is_cuda:
        return fits
    half = x.dtype in (torch.float16, torch.bfloat16)
    return half and (backend == "triton" or x.numel() >= LEAST_ROWS * x.shape[-1])
