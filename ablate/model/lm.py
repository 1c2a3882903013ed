"""The language model: embedding, a stack of residual layers, a final norm, the output projection.

Parameters are float32; under bf16 autocast the projections and scans run in bf16 while the residual
stream stays float32, as the embedding starts it and autocast promotes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ablate.arch.spec import Architecture
from ablate.errors import UserError
from ablate.kernels import linear_cross_entropy, rotary_table
from ablate.layers.context import Context, ResidualLayer, State, pre_norm
from ablate.layers.registry import KINDS
from ablate.model.init import init_weights

MOST_SHAPES = 12  # that one process compiles a layer for: the candidates of a micro-batch


@dataclass
class DecodeState:
    """Caches of a batch of sequences.

    position_B: tokens that each row has seen, a tensor so that a captured step can advance it.
    max_len: tokens that the caches have room for.
    """

    position_B: Tensor
    max_len: int
    layers: list[State]

    @property
    def nbytes(self) -> int:
        """Of all caches of all rows."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.values())

    def first(self, rows: int) -> DecodeState:
        """The first rows, sharing memory with the whole."""
        layers = [{name: t[:rows] for name, t in layer.items()} for layer in self.layers]
        return DecodeState(self.position_B[:rows], self.max_len, layers)

    def reset(self) -> None:
        """Empty again, in place."""
        self.position_B.zero_()
        for layer in self.layers:
            for tensor in layer.values():
                tensor.zero_()


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Of matrix products of x: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def same_shape(layer: Any, x: Tensor, y: Any) -> Tensor:
    """y, which a layer made of the stream x: a user's own may give another, which broadcasts."""
    if not isinstance(y, Tensor) or y.shape != x.shape:
        made = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise UserError(f"{type(layer).__name__}.forward gave {made}, not {tuple(x.shape)}")
    return y


class LanguageModel(nn.Module):
    """A decoder-only language model of an `Architecture`.

    seed: initialises the weights; None leaves them undefined, to be loaded.
    """

    roles: ClassVar[dict[str, str]] = {
        "embedding": "embedding",
        "final_norm": "ones",
        "unembedding": "embedding",
    }

    def __init__(self, arch: Architecture, *, seed: int | None = 0) -> None:
        super().__init__()
        self.arch = arch
        self.embedding = nn.Parameter(torch.empty(arch.vocab_size, arch.d_model))
        self.layers: Any = nn.ModuleList()
        for letter, options in zip(arch.letters, arch.layer_options, strict=True):
            layer = KINDS[letter].module(options, arch.norm_eps)
            told, made = options.num_params(), sum(p.numel() for p in layer.parameters())
            if told != made:  # of a user's own kind: its cost would be wrong, and what it matches
                raise UserError(
                    f"layer kind '{KINDS[letter].name}': {type(options).__name__}.num_params() is "
                    f"{told}, but {type(layer).__name__} has {made}"
                )
            self.layers.append(layer)
        self.final_norm = nn.Parameter(torch.empty(arch.d_model))
        if arch.tie_embeddings:
            self.unembedding = None
        else:
            self.unembedding = nn.Parameter(torch.empty(arch.vocab_size, arch.d_model))
        self._chained: dict[type, Any] = {}  # in training, by kind of layer
        self.compiles = False  # some of these
        self.activation_checkpointing = False  # layers keep their input, and run again backwards
        self.expected_compilations: int | None = 0  # of all steps of one shape; None: not known
        rotary = [o for o in arch.layer_options if getattr(o, "rope_base", None)]
        self._rotary = sorted({(o.rope_base, o.rope_dim) for o in rotary})
        if seed is not None:
            init_weights(self, seed)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Chain the layers for training, and compile each kind that has something to fuse.

        backend: torch.compile's.

        Layers of one kind share the code. A user's own kind takes part if it is a `ResidualLayer`
        with that class's forward, and runs as it is otherwise. A layer is compiled once a kind,
        option set and shape of its input; `expected_compilations` says how often that is for one
        shape.
        """
        residual = [layer for layer in self.layers if isinstance(layer, ResidualLayer)]
        own = {type(x) for x in residual if type(x).forward is ResidualLayer.forward}
        fused = {type(layer) for layer in self.layers if type(layer) in own and layer.fusible}
        self._chained = {kind: kind.chained for kind in own}
        self.compiles = bool(fused)
        kinds = zip(self.layers, self.arch.letters, map(repr, self.arch.layer_options), strict=True)
        variants = {(letter, o) for layer, letter, o in kinds if type(layer) in fused}
        # what the layers of others compile is theirs
        ours = all(type(layer) in own for layer in self.layers)
        self.expected_compilations = len(variants) if ours else None
        if fused or not ours:
            from torch._inductor import config  # slow, and for those who compile

            config.deterministic = torch.are_deterministic_algorithms_enabled()
        if not fused:
            return
        # Several shapes are tried when a micro-batch is searched.
        limit = MOST_SHAPES * len(variants)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Padded strides would be copied away again: our operations take rows as they are laid out.
        options: Any = {"comprehensive_padding": False} if backend == "inductor" else None
        for kind in fused:
            self._chained[kind] = torch.compile(
                kind.chained, backend=backend, options=options, fullgraph=True, dynamic=False
            )

    @contextlib.contextmanager
    def one_layer_a_kind(self) -> Iterator[None]:
        """Inside, the model has the first layer of each kind and option set only."""
        whole = self.layers
        kinds = zip(self.arch.letters, map(repr, self.arch.layer_options), whole, strict=True)
        first: dict[tuple[str, str], Any] = {}
        for letter, options, layer in kinds:
            first.setdefault((letter, options), layer)
        self.layers = nn.ModuleList(first.values())
        try:
            yield
        finally:
            self.layers = whole

    def compilations(self) -> int:
        """Graphs that this process has compiled so far, of this model or not."""
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) if self.compiles else 0

    @property
    def output_weight_VD(self) -> Tensor:
        return self.embedding if self.unembedding is None else self.unembedding

    def parameter_roles(self) -> dict[str, tuple[nn.Parameter, str, nn.Module]]:
        """Every parameter by name: itself, its role (`model/init.py`), the module that owns it.

        Raises ValueError when a layer's `roles` do not name one of its parameters.
        """
        result = {}
        owners: list[tuple[str, Any]] = [("", self)]
        owners += [(f"layers.{i}.", layer) for i, layer in enumerate(self.layers)]
        for prefix, owner in owners:
            for name, parameter in owner.named_parameters(recurse=owner is not self):
                if name not in owner.roles:
                    raise ValueError(
                        f"{type(owner).__name__}.roles does not name the parameter '{name}'; it "
                        "must, with one of the roles of ablate/model/init.py"
                    )
                result[prefix + name] = (parameter, owner.roles[name], owner)
        return result

    def _hidden(self, tokens_BL: Tensor, doc_start_BL: Tensor | None) -> tuple[Tensor, Context]:
        index_1L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)[None]
        x = F.embedding(tokens_BL, self.embedding)
        positions_BL = index_1L if doc_start_BL is None else index_1L - doc_start_BL
        ctx = self._context(x, positions_BL, doc_start_BL)
        chain = self._chained if self.training else {}
        u = None  # the stream normalised for the next layer, out of a chained one
        for layer, following in zip(self.layers, [*self.layers[1:], None], strict=True):
            chained = chain.get(type(layer))
            if chained is None:
                x, u = same_shape(layer, x, self._run(layer, layer, x, ctx)), None
                continue
            if u is None:
                u = pre_norm(x, layer.norm, layer.eps).to(_compute_dtype(x))
            norm = following.norm if type(following) in chain else self.final_norm
            u, x = self._run(layer, chained, layer, u, x, norm, ctx)
        return self._final(x) if u is None else u, ctx

    def _run(self, layer: Any, function: Any, *args: Any) -> Any:
        """function(*args), which is `layer`, checkpointed where that is asked for."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return function(*args)
        # Reading the random state would end a graph capture, and no layer of ours draws from it.
        random = not type(layer).__module__.startswith("ablate.")
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random)

    def _context(
        self, x: Tensor, positions_BL: Tensor, doc_start_BL: Tensor | None = None
    ) -> Context:
        dtype = torch.promote_types(x.dtype, torch.float32)
        tables = {key: rotary_table(positions_BL, *key, dtype) for key in self._rotary}
        return Context(positions_BL, doc_start_BL, x, tables)

    def hidden(self, tokens_BL: Tensor, doc_start_BL: Tensor | None = None) -> Tensor:
        """The stream after the final norm, (B, L, D)."""
        return self._hidden(tokens_BL, doc_start_BL)[0]

    def logits(
        self,
        tokens_BL: Tensor,
        doc_start_BL: Tensor | None = None,
        *,
        keep_BL: Tensor | None = None,
    ) -> Tensor:
        """All logits, (B, L, V), at least float32; or those of the positions in `keep_BL`, (n, V),
        row by row. All are large: training and scoring use `loss`."""
        hidden = self.hidden(tokens_BL, doc_start_BL)
        return self._project(hidden if keep_BL is None else hidden[keep_BL])

    def _final(self, x: Tensor) -> Tensor:
        return pre_norm(x, self.final_norm, self.arch.norm_eps)

    def _project(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.output_weight_VD)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor,
        doc_start_BL: Tensor | None = None,
        *,
        z_loss: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy in nats against targets (-100: not scored), without keeping the logits.

        reduction: "mean" over scored targets, "sum", or "none": (B, L), each target's cross-entropy
            without z-loss, auxiliary losses and gradients.
        z_loss: weight of logsumexp(logits)^2, added per target. Auxiliary losses of layers are
            added to a mean as they are, to a sum times the number of scored targets.
        """
        hidden, ctx = self._hidden(tokens_BL, doc_start_BL)
        loss = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.output_weight_VD,
            targets_BL.flatten(),
            z_loss=z_loss,
            reduction=reduction,
        )
        if reduction == "none":
            return loss.view_as(targets_BL)
        for auxiliary in ctx.losses:
            scored = (targets_BL != -100).sum() if reduction == "sum" else 1
            loss = loss + auxiliary * scored
        return loss

    forward = loss

    # --- decoding -----------------------------------------------------------------------------

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype | None = None) -> DecodeState:
        """Empty caches for sequences of up to `max_len` tokens, in `dtype` (the weights')."""
        device = self.embedding.device
        dtype = dtype or self.embedding.dtype
        return DecodeState(
            position_B=torch.zeros(batch, dtype=torch.long, device=device),
            max_len=max_len,
            layers=[layer.init_state(batch, max_len, device, dtype) for layer in self.layers],
        )

    def prefill(
        self, tokens_BL: Tensor, state: DecodeState, lengths_B: Tensor | None = None
    ) -> Tensor:
        """Fill empty caches with prompts; returns the logits after each one's last token, (B, V).

        lengths_B: tokens of each prompt, where rows are padded on the right; every one 1 or more.
        """
        length = tokens_BL.shape[1]
        if length > state.max_len:
            raise ValueError(f"a prompt of {length} tokens does not fit max_len {state.max_len}")
        if lengths_B is not None and not all(getattr(x, "ragged", False) for x in self.layers):
            return self._prefill_by_length(tokens_BL, state, lengths_B)
        x = F.embedding(tokens_BL, self.embedding)
        positions_1L = torch.arange(length, device=tokens_BL.device)[None]
        ctx = self._context(x, positions_1L)
        ctx.lengths_B = lengths_B
        for layer, cache in zip(self.layers, state.layers, strict=True):
            x = layer(x, ctx, cache)
        state.position_B += length if lengths_B is None else lengths_B
        rows_B = torch.arange(len(x), device=x.device)
        last = x[:, -1] if lengths_B is None else x[rows_B, lengths_B - 1]
        return self._project(self._final(last))

    def _prefill_by_length(
        self, tokens_BL: Tensor, state: DecodeState, lengths_B: Tensor
    ) -> Tensor:
        """Rows of equal length together, for layers that know nothing of padding."""
        logits_BV = torch.empty(0)
        for length in sorted(set(lengths_B.tolist())):
            rows = (lengths_B == length).nonzero()[:, 0]
            layers = [{name: t[rows] for name, t in cache.items()} for cache in state.layers]
            part = DecodeState(state.position_B[rows], state.max_len, layers)
            logits = self.prefill(tokens_BL[rows, :length], part)
            if not logits_BV.numel():
                logits_BV = logits.new_empty(len(lengths_B), logits.shape[1])
            logits_BV[rows] = logits
            state.position_B[rows] = part.position_B
            for cache, filled in zip(state.layers, layers, strict=True):
                for name, tensor in filled.items():
                    cache[name][rows] = tensor
        return logits_BV

    def step(self, tokens_B: Tensor, state: DecodeState) -> Tensor:
        """One more token each; returns the logits after it, (B, V). Updates the caches in place.

        The caller keeps within max_len: nothing is read back from the device to check it.
        """
        x = F.embedding(tokens_B, self.embedding)
        ctx = self._context(x, state.position_B[:, None])
        u = None  # the stream normalised for the next layer, in one kernel with the addition
        followers = [*self.layers[1:], None]
        for layer, following, cache in zip(self.layers, followers, state.layers, strict=True):
            if not isinstance(layer, ResidualLayer):
                x, u = layer.step(x, ctx, cache), None
                continue
            if u is None:
                u = pre_norm(x, layer.norm, layer.eps)
            norm = following.norm if isinstance(following, ResidualLayer) else self.final_norm
            u, x = layer.chained_step(u, x, norm, ctx, cache)
        state.position_B += 1
        return self._project(self._final(x) if u is None else u)
