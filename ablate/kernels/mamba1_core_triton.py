"""`mamba1_core` on a GPU: one backward pass over the kernels of its parts and the products between.

Kernels read their half of the in-projection's output in place, and in the backward pass write
their half of its one gradient: the scan dz, the convolution dx. What the projection to dt, B and C
gives the gradient of u is added by its product. Kept for the backward pass are u, what it projects
to, the step sizes before softplus and the states that the scan saves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels import conv1d_triton as conv1d
from ablate.kernels import selective_scan_triton as scan
from ablate.kernels.dispatch import ALIGN
from ablate.kernels.linear import weight_gradient
from ablate.kernels.tiles_triton import contiguous, starts, wants_gradients


class _Mamba1Core(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor,
        dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, doc: Tensor | None, save: bool,
    ) -> Tensor:  # fmt: skip
        (inner, rank), n_state = dt_proj.shape, A_log.shape[1]
        x, z = xz[..., :inner], xz[..., inner:]
        u = conv1d.forward_op(x, conv_weight, conv_bias, True, None, doc)
        # rows of zeros make those of the product whole 16 bytes
        to_maps = F.pad(x_proj.to(u.dtype), (0, 0, 0, -len(x_proj) % ALIGN))
        to_steps = dt_proj.to(u.dtype)
        with torch.autocast(u.device.type, enabled=False):  # as is what the gradients are made of
            maps = F.linear(u, to_maps)
            steps = F.linear(maps.flatten(0, 1)[:, :rank], to_steps).view(u.shape)
        # B and C are small, and every program of the scan reads them: in float32, once for all
        ends = (rank, rank + n_state, rank + 2 * n_state)
        B, C = (v.float().contiguous() for v in maps.tensor_split(ends, dim=-1)[1:3])
        A = -A_log.float().exp()
        y, _, saved = scan.forward_op(u, steps, A, B, C, D, z, dt_bias, None, doc, True, save)
        ctx.save_for_backward(
            xz, u, maps, steps, A, B, C, saved, conv_weight, conv_bias, to_maps, to_steps, dt_bias,
            D, doc,
        )  # fmt: skip
        ctx.dtypes = [v.dtype for v in (x_proj, dt_proj, A_log)]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (
            xz, u, maps, steps, A, B, C, saved, conv_weight, conv_bias, to_maps, to_steps, dt_bias,
            D, doc,
        ) = ctx.saved_tensors  # fmt: skip
        (inner, rank), n_state = to_steps.shape, A.shape[1]
        x, z = xz[..., :inner], xz[..., inner:]
        d_xz = torch.empty_like(xz)
        dx, dz = d_xz[..., :inner], d_xz[..., inner:]
        du, d_steps, dB, dC, dA, sums, _ = scan.backward_op(
            grads[0], None, u, steps, A, B, C, D, z, dt_bias, doc, saved, True, dz
        )
        d_maps = torch.zeros_like(maps)
        rows, used = d_maps.flatten(0, 1), rank + 2 * n_state
        rows[:, :rank].addmm_(d_steps.flatten(0, 1), to_steps, beta=0)
        d_maps[..., rank : rank + n_state] = dB
        d_maps[..., rank + n_state : used] = dC
        du.flatten(0, 1).addmm_(rows, to_maps)
        taps, _ = conv1d.gradients_op(du, x, conv_weight, conv_bias, True, None, doc, dx)
        of_x_proj, of_dt_proj, of_A_log = ctx.dtypes
        return (
            d_xz,
            *conv1d.parameter_gradients(taps, conv_weight, conv_bias),
            weight_gradient(d_maps, u)[:used].to(of_x_proj),
            weight_gradient(d_steps, maps[..., :rank]).to(of_dt_proj),
            sums[1].to(dt_bias.dtype),
            (dA * A).to(of_A_log),
            sums[0].to(D.dtype),
            None,
            None,
        )


def mamba1_core_triton(
    xz_BLE: Tensor, conv_weight_IK: Tensor, conv_bias_I: Tensor | None, x_proj_MI: Tensor,
    dt_proj_IR: Tensor, dt_bias_I: Tensor, A_log_IN: Tensor, D_I: Tensor,
    doc_start_BL: Tensor | None,
) -> Any:  # fmt: skip
    """See `ablate.kernels.mamba1_core`."""
    inputs = (
        xz_BLE, conv_weight_IK, conv_bias_I, x_proj_MI, dt_proj_IR, dt_bias_I, A_log_IN, D_I,
    )  # fmt: skip
    save = wants_gradients(*inputs)
    return _Mamba1Core.apply(*map(contiguous, inputs), starts(doc_start_BL), save)
