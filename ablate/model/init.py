"""Initial weights and weight decay, by the role of each parameter.

Both are properties of a study, the same for every variant. A parameter's values are drawn from a
stream of its own, named by the seed, its layer's index, module class and attribute, so that what
two variants share starts equal: the embedding, and each layer that stands at the same place. Full
and sliding attention are one module and start equal too.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ablate.model.lm import LanguageModel

DECAYING = {"matrix", "residual", "dt_proj"}
"""Roles with weight decay. Without: embedding and unembedding, norms, biases, the taps of
convolutions, and Mamba's A_log, D and dt_bias."""


def _values(role: str, shape: torch.Size, generator: torch.Generator, o: Any, scale: Any) -> Tensor:
    """Initial values, float32 on the CPU.

    role: matrix, embedding: normal(init_std).
        residual (a layer's output projection): normal(init_std / sqrt(number of layers)), GPT-2's.
        ones (norms, D), zeros (biases).
        conv: uniform within 1/sqrt(taps), as torch's Conv1d, for taps and biases.
        dt_bias: inverse softplus of log-uniform step sizes; dt_proj: uniform within
        1/sqrt(dt_rank); a_uniform: log of uniform(a_init); a_range: log of 1..N (Mamba's).
    o: the layer's options. scale: (init_std, number of layers).
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    init_std, n_layers = scale
    if role in ("matrix", "embedding"):
        return torch.empty(shape).normal_(0.0, init_std, generator=generator)
    if role == "residual":
        return torch.empty(shape).normal_(0.0, init_std / math.sqrt(n_layers), generator=generator)
    if role == "ones":
        return torch.ones(shape)
    if role == "zeros":
        return torch.zeros(shape)
    if role == "conv":
        bound = o.d_conv**-0.5
        return uniform(-bound, bound)
    if role == "dt_bias":
        dt = uniform(math.log(o.dt_min), math.log(o.dt_max)).exp().clamp(min=o.dt_floor)
        return dt + torch.log(-torch.expm1(-dt))
    if role == "dt_proj":
        return uniform(-(o.dt_rank**-0.5), o.dt_rank**-0.5)
    if role == "a_uniform":
        return uniform(*o.a_init).log()
    if role == "a_range":
        return torch.arange(1, shape[-1] + 1, dtype=torch.float32).log().expand(shape)
    raise ValueError(f"role '{role}' is unknown; see ablate/model/init.py")


@torch.no_grad()
def init_weights(model: LanguageModel, seed: int) -> None:
    """Fill every parameter, in place. The values do not depend on the device or on the order."""
    arch = model.arch
    for name, (parameter, role, owner) in model.parameter_roles().items():
        digest = hashlib.sha256(f"{seed}:{name}:{owner.__class__.__name__}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        options = getattr(owner, "options", None)
        scale = (arch.init_std, arch.n_layers)
        parameter.copy_(_values(role, parameter.shape, generator, options, scale))


def param_groups(model: LanguageModel, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimiser: "decay" and "no_decay", with "params", "weight_decay", "names".

    Every parameter stands in exactly one; see `DECAYING`.
    """
    groups: dict[str, dict[str, Any]] = {
        "decay": {"name": "decay", "params": [], "weight_decay": weight_decay, "names": []},
        "no_decay": {"name": "no_decay", "params": [], "weight_decay": 0.0, "names": []},
    }
    for name, (parameter, role, _) in model.parameter_roles().items():
        group = groups["decay" if role in DECAYING else "no_decay"]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups.values() if group["params"]]
