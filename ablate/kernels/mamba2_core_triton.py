"""`mamba2_core` on a GPU: one operation with one backward pass, over the kernels of its parts.

Every kernel reads its slice of the projection's output in place, and in the backward pass writes
its slice of the one gradient: the gate dz, the convolution dx, dB and dC, the step sizes ddt. Kept
for the backward pass are the convolution's output, the scan's output and the states between chunks;
what SiLU, softplus and the norm need is computed again. Where the norm is left to what follows
(`squares`), the scan gates what it writes, and the gated output is all that is kept of it. With the
projection that follows, the gate's gradient is the epilogue of the product that gives the output's,
on Hopper (`ablate.kernels.hopper`), or comes after it.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels import conv1d_triton as conv1d
from ablate.kernels import norm_triton as norm
from ablate.kernels import ssd_triton as ssd
from ablate.kernels.dispatch import define_op
from ablate.kernels.hopper import products
from ablate.kernels.linear import weight_gradient
from ablate.kernels.tiles_triton import contiguous, dense_last, starts


def _split(t: Tensor, inner: int, channels: int, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """z as (B L, I), x B C as (B, L, I + 2 G N) and dt (B, L, H): views of a dense (B, L, E)."""
    z = t.view(-1, t.shape[-1])[:, :inner]
    return z, *t[..., inner : inner + channels + n_heads].split((channels, n_heads), dim=-1)


def _heads(t: Tensor, inner: int, head_dim: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, L, H, P), B and C (B, L, G, N): views of a dense (B, L, I + 2 G N)."""
    shared = (t.shape[-1] - inner) // 2
    B, C = t[..., inner : inner + shared], t[..., inner + shared :]
    x = t[..., :inner].unflatten(-1, (-1, head_dim))
    return x, B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))


def _forward(
    zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, norm_weight: Tensor | None, doc: Tensor | None, head_dim: int, groups: int,
    eps: float, norm_group: int, squares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, the sums of its squares (empty unless asked for), and for the backward pass the
    convolution's output, y (empty where out is gated alone), the states and step sizes."""
    n_heads = A_log.shape[0]
    inner = n_heads * head_dim
    z, xbc, dt = _split(zxbcdt, inner, conv_weight.shape[0], n_heads)
    conv = conv1d.forward(xbc, conv_weight, conv_bias, True, None, doc)
    x, B, C = _heads(conv, inner, head_dim, groups)
    dts = ssd.step_sizes(dt, A_log, dt_bias, True, log_a=True)
    states, _ = ssd.chunk_states(x, B, dts, doc, None, reverse=False)
    gate = zxbcdt[..., :inner] if squares else None
    y, sums = ssd.scan(x, B, C, D, dts, doc, states, gate)
    if squares:
        return y.flatten(2), sums, conv, y.new_empty(0), states, dts
    normed = norm_weight is not None
    out = norm.gated_forward(y.view(z.shape), z, norm_weight, eps, norm_group, False, normed)
    return out.view(y.shape[0], y.shape[1], inner), sums, conv, y, states, dts


def _forward_fake(
    zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, doc, head_dim, groups, eps,
    norm_group, squares,
):  # fmt: skip
    b, length, _ = zxbcdt.shape
    n_heads, channels = A_log.shape[0], conv_weight.shape[0]
    inner = n_heads * head_dim
    n_state = (channels - inner) // 2 // groups
    n_chunks = (length + ssd.Q - 1) // ssd.Q
    return (
        zxbcdt.new_empty((b, length, inner)),
        zxbcdt.new_empty(
            (b, length, ssd.scan_parts(n_heads, groups, b, length)) if squares else 0,
            dtype=torch.float32,
        ),
        zxbcdt.new_empty((b, length, channels)),
        zxbcdt.new_empty(0 if squares else (b, length, n_heads, head_dim)),
        zxbcdt.new_empty((b, n_chunks, n_heads, head_dim, n_state)),
        zxbcdt.new_empty((3, b, n_heads, n_chunks * ssd.Q), dtype=torch.float32),
    )


def _backward(
    dout: Tensor, dsquares: Tensor | None, zxbcdt: Tensor, conv: Tensor, y: Tensor, states: Tensor,
    dts: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, A_log: Tensor, D: Tensor,
    norm_weight: Tensor | None, projection: Tensor | None, doc: Tensor | None, groups: int,
    eps: float, norm_group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of zxbcdt, of the taps and the bias (5, C), of A_log, dt_bias and D (H,) (the
    rows of the sums), of D (H, P) (empty for D (H,)), and of the norm's weight (empty without
    one). y is the gated output where there is a gradient of its squares (B, L), and dout then is
    that of y projection^T, if there is one."""
    n_heads, head_dim = states.shape[2:4]
    inner = n_heads * head_dim
    channels = conv.shape[2]
    z, xbc, _ = _split(zxbcdt, inner, channels, n_heads)
    dzxbcdt = torch.empty_like(zxbcdt)
    dz, dxbc, ddt = _split(dzxbcdt, inner, channels, n_heads)
    dzxbcdt[..., inner + channels + n_heads :].zero_()
    dout, y = dense_last(dout.reshape(-1, dout.shape[-1])), y.view(z.shape)
    if dsquares is None:
        dy, d_norm = norm.gated_gradients(
            dout, y, z, norm_weight, dz, eps, norm_group, False, norm_weight is not None
        )
    else:
        dy = _gate_gradients(dout, projection, dsquares.flatten(), y, z, dz)
        d_norm = y.new_empty(0)
    dy = dy.view(*conv.shape[:2], n_heads, head_dim)
    x, B, C = _heads(conv, inner, head_dim, groups)
    dconv = torch.empty_like(conv)
    dx, dB, dC = _heads(dconv, inner, head_dim, groups)
    dstates, _ = ssd.chunk_states(dy, C, dts, doc, None, reverse=True)
    parts, through = ssd.gradients(x, dy, B, C, D, dts, doc, states, dstates, dx, dB, dC)
    sums = ssd.step_size_gradients(parts, through, dts, A_log, ddt, True, D.ndim == 1, log_a=True)
    taps, _ = conv1d.gradients(dconv, xbc, conv_weight, conv_bias, True, None, doc, dxbc)
    return dzxbcdt, taps, sums, ssd.skip_gradient(x, dy, D), d_norm


def _gate_gradients(
    dout: Tensor, projection: Tensor | None, dsquares: Tensor, y: Tensor, z: Tensor, dz: Tensor
) -> Tensor:
    """Writes the gate's and returns that of what is gated."""
    if projection is not None:
        whole = all(n % 8 == 0 for n in (*projection.shape, z.stride(0), z.data_ptr() // 2))
        if whole and (kernels := products(dout)):
            dy: Tensor = kernels.gate_gradients(dout, projection, dsquares, y, z, dz)
            return dy
        dout = dout @ projection
    return norm.gate_gradients(dout.contiguous(), dsquares, y, z, dz)


def _backward_fake(
    dout, dsquares, zxbcdt, conv, y, states, dts, conv_weight, conv_bias, A_log, D, norm_weight, *_
):
    return (
        zxbcdt.new_empty(zxbcdt.shape),
        dts.new_empty((5, conv.shape[2])),
        dts.new_empty((3, states.shape[2])),
        dts.new_empty(D.shape if D.ndim == 2 else 0),
        dts.new_empty(0) if norm_weight is None else norm_weight.new_empty(norm_weight.shape),
    )


_forward_op = define_op(
    "mamba2_core_forward(Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, "
    "Tensor A_log, Tensor D, Tensor? norm_weight, Tensor? doc, int head_dim, int groups, "
    "float eps, int norm_group, bool squares) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    several=True,
)
_backward_op = define_op(
    "mamba2_core_backward(Tensor dout, Tensor? dsquares, Tensor zxbcdt, Tensor conv, Tensor y, "
    "Tensor states, Tensor dts, Tensor conv_weight, Tensor? conv_bias, Tensor A_log, Tensor D, "
    "Tensor? norm_weight, Tensor? projection, Tensor? doc, int groups, float eps, int norm_group)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    several=True,
)


class _Mamba2Core(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor,
        A_log: Tensor, D: Tensor, norm_weight: Tensor | None, projection: Tensor | None,
        doc: Tensor | None, head_dim: int, groups: int, eps: float, norm_group: int,
    ) -> Any:  # fmt: skip
        apart = projection is not None
        out, squares, conv, y, states, dts = _forward_op(
            zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, None if apart else norm_weight, doc,
            head_dim, groups, eps, norm_group, apart,
        )  # fmt: skip
        low = None  # the projection in the type of its products
        if projection is not None and norm_weight is not None:
            low = norm.scale_columns(projection, norm_weight, out.dtype)
        elif projection is not None:
            low = projection.to(out.dtype)
        ctx.save_for_backward(
            zxbcdt, conv, out if apart else y, states, dts, conv_weight, conv_bias, A_log, D,
            norm_weight, low, doc, projection,
        )  # fmt: skip
        ctx.options = (groups, eps, norm_group)
        ctx.dt_bias_dtype = dt_bias.dtype
        return out if low is None else (F.linear(out, low), squares)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: activation checkpointing gives them no second time
        conv_weight, conv_bias, A_log, D, norm_weight, low, doc, projection = saved[5:]
        dout, dsquares = grads[0], None
        d_norm = d_projection = None
        apart = projection is not None
        if apart:
            y, dsquares = saved[2], grads[1]
            if ctx.needs_input_grad[6] or ctx.needs_input_grad[7]:
                d_projection = weight_gradient(dout, y)
                if norm_weight is not None:
                    d_projection, d_norm = norm.scale_columns_gradients(
                        d_projection, projection, norm_weight
                    )
                d_projection = d_projection.to(projection.dtype)
            if dsquares.shape[-1] == 1 or dsquares.stride(-1) == 0:
                dsquares = dsquares[..., 0].contiguous()
            else:
                dout, dsquares = _into_output(dout @ low, dsquares, y)
                low = None
        dzxbcdt, taps, sums, dD, d_norm_within = _backward_op(
            dout, dsquares, *saved[:9], None if apart else norm_weight, low, doc,
            *ctx.options,
        )  # fmt: skip
        if norm_weight is not None and not apart:
            d_norm = d_norm_within
        return (
            dzxbcdt,
            *conv1d.parameter_gradients(taps, conv_weight, conv_bias),
            sums[1].to(ctx.dt_bias_dtype),
            sums[0].to(A_log.dtype),
            (sums[2] if D.ndim == 1 else dD).to(D.dtype),
            d_norm,
            d_projection,
            *(None,) * 5,
        )


def _into_output(dout: Tensor, dsquares: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of squares that differ between the parts of a row go into that of the output; a
    norm over all parts gives one number a position."""
    part = out.shape[-1] // dsquares.shape[-1]
    extra = 2 * out.float() * dsquares.repeat_interleave(part, -1)
    return (dout + extra).to(dout.dtype), torch.zeros_like(dsquares[..., 0])


def mamba2_core_triton(
    zxbcdt_BLE: Tensor, conv_weight_CK: Tensor, conv_bias_C: Tensor | None, dt_bias_H: Tensor,
    A_log_H: Tensor, D_H: Tensor, norm_weight_I: Tensor | None, projection_DI: Tensor | None,
    head_dim: int, n_groups: int, eps: float, norm_group: int, doc_start_BL: Tensor | None,
) -> Any:  # fmt: skip
    """See `ablate.kernels.mamba2_core`."""
    inputs = (
        zxbcdt_BLE, conv_weight_CK, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_weight_I,
        projection_DI,
    )  # fmt: skip
    return _Mamba2Core.apply(
        *map(contiguous, inputs), starts(doc_start_BL), head_dim, n_groups, eps, norm_group
    )
