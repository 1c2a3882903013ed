"""What can be evaluated: a model of ours, or any causal transformers model; and how each is found.

A subject turns text into ids and scores or continues them; `adapter.py` is lm-eval's face of it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate import config
from ablate.data import corpus
from ablate.data import tokenizer as tokenizers
from ablate.data.tokenizer import Tokenizer
from ablate.errors import UserError
from ablate.model import Decoder, LanguageModel, Sampling, generate
from ablate.run import RunFolder, find_runs
from ablate.train import checkpoint
from ablate.train.environment import device_of, uses_bf16
from ablate.train.loop import architecture_of

_PROJECTED = 4096  # positions whose logits are held at a time
_ROUNDED = 256  # caches come in multiples of this, so that few are made and captured


class OwnModel:
    """A `LanguageModel` with its tokenizer.

    max_length: tokens that benchmarks may use, the training length: what is longer is cut on the
        left, as lm-eval does. Recall tasks set it aside.
    Texts are read after an end-of-text, as training documents are.
    """

    bounded = False  # whether texts are cut at max_length, whatever is asked
    rolls_special = False  # whether whole documents are read with the tokens that encode adds
    positions: int | None = None  # tokens after which a model has no position; None: no end

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        name: str = "model",
        bf16: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.max_length, self.name = model, tokenizer, max_length, name
        self.device = model.embedding.device
        self.eos_id = self.prefix_id = tokenizer.eos_id
        self.bf16 = bf16
        self._decoder: Decoder | None = None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Ids of each text, after an end-of-text if `special`."""
        begun = [self.prefix_id] if special else []
        return [begun + ids for ids in self.tokenizer.encode_all(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def logits(self, tokens_BL: Tensor, keep_BL: Tensor) -> Iterator[Tensor]:
        """Logits after the positions in `keep_BL`, row by row, in parts of (n, V), of which one is
        held at a time."""
        with self.autocast():
            hidden_MD = self.model.hidden(tokens_BL)[keep_BL]
        for part_ND in hidden_MD.split(_PROJECTED):
            with self.autocast():
                logits = F.linear(part_ND, self.model.output_weight_VD)
            yield logits[:, : self.tokenizer.vocab_size]

    def generate(
        self, prompts: Sequence[Sequence[int]], n_tokens: int, until: Sequence[str], options: Any
    ) -> list[str]:
        """Text after each prompt, up to and with the first of the stop strings."""
        sampling = _sampling(options)

        def stop(row: int, new: list[int]) -> bool:
            if new[-1] == self.eos_id:
                return True
            text = self.decode(new)
            return any(word in text for word in until)

        longest = max(map(len, prompts)) + n_tokens
        new = generate(
            self.model,
            prompts,
            n_tokens,
            sampling=sampling,
            vocab_size=self.tokenizer.vocab_size,
            stop=stop,
            generator=torch.Generator(self.device).manual_seed(0),
            decoder=self._decoder_for(len(prompts), longest),
        )
        return [self.decode(ids) for ids in new]

    def _decoder_for(self, batch: int, length: int) -> Decoder:
        """Batches come with falling lengths and more and more rows: room for twice as many rows
        serves them until the caches are twice as long as needed."""
        d = self._decoder
        if d is None or d.batch < batch or not length <= d.max_len <= 2 * length + _ROUNDED:
            self._decoder = None  # its memory goes first
            room = -(-length // _ROUNDED) * _ROUNDED
            rows = 1 if batch == 1 else max(batch, min(256, 1 << batch.bit_length()))
            dtype = torch.bfloat16 if self.bf16 else None
            d = Decoder(self.model, rows, room, cache_dtype=dtype, autocast=self.autocast)
            self._decoder = d
        return d

    @contextlib.contextmanager
    def tokenizer_file(self) -> Any:
        """What recall tasks count tokens with: "byte" or a tokenizer.json."""
        if self.tokenizer.definition is None:
            yield "byte"
            return
        with _written(self.tokenizer.definition) as path:
            yield path


class HFModel:
    """A causal transformers model with its tokenizer, scored as lm-eval's own `hf` model does.

    max_length: tokens that are read at most, what is longer is cut on the left; None: what lm-eval
        takes, the config's, or 2048 where it names none.
    """

    bounded = True
    rolls_special = True

    def __init__(
        self, model: Any, tokenizer: Any, *, max_length: int | None = None, name: str = "hf"
    ) -> None:
        from lm_eval.models.utils import configure_pad_token, resolve_max_length

        self.model, self.name = model.eval(), name
        self.tokenizer = configure_pad_token(tokenizer, model_config=model.config)
        self.device = model.device
        self.positions = _positions(model)
        usual: int = resolve_max_length(model.config, tokenizer, default=2048)
        self.max_length = max_length or usual
        if self.positions is not None and self.max_length > self.positions:
            raise UserError(
                f"max_length is {self.max_length}, but the model has {self.positions} positions"
            )
        self.eos_id = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id
        self.prefix_id = self.eos_id if bos is None else bos
        if self.prefix_id is None:
            raise UserError(f"'{name}' has a tokenizer with neither a begin nor an end of text")
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """With the special tokens that the tokenizer adds by itself, unless a text has them."""
        mark = self.tokenizer.decode(self.prefix_id)
        result: list[list[int]] = [[] for _ in texts]
        for adds in (True, False):
            own = [i for i, t in enumerate(texts) if (special and not t.startswith(mark)) == adds]
            if own:
                some = [texts[i] for i in own]
                found = self.tokenizer(some, add_special_tokens=adds, verbose=False)["input_ids"]
                for i, ids in zip(own, found, strict=True):
                    result[i] = list(ids)
        return result

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def logits(self, tokens_BL: Tensor, keep_BL: Tensor) -> Iterator[Tensor]:
        """Logits after the positions in `keep_BL`, row by row, in parts of (n, V)."""
        first = int(keep_BL.any(0).nonzero()[0])  # what comes before is not projected
        options = {"logits_to_keep": keep_BL.shape[1] - first} if self._keeps else {}
        logits_BLV = self.model(tokens_BL, **options).logits
        yield from logits_BLV[keep_BL[:, -logits_BLV.shape[1] :]].split(_PROJECTED)

    def generate(
        self, prompts: Sequence[Sequence[int]], n_tokens: int, until: Sequence[str], options: Any
    ) -> list[str]:
        from lm_eval.models.utils_hf import stop_sequences_criteria

        width = max(map(len, prompts))
        shape = (len(prompts), width)
        tokens = torch.full(shape, self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        eos = self.tokenizer.decode(self.eos_id, skip_special_tokens=False)
        words = [*until, *([] if eos in until else [eos])]
        out = self.model.generate(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            max_length=width + n_tokens,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, words, width, len(prompts)),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **options,
        )
        return [self.decode(ids) for ids in out[:, width:].tolist()]

    @contextlib.contextmanager
    def tokenizer_file(self) -> Any:
        inner = getattr(self.tokenizer, "backend_tokenizer", None)
        if inner is None:
            yield self.tokenizer.name_or_path
            return
        with _written(inner.to_str()) as path:
            yield path


Subject = OwnModel | HFModel


@contextlib.contextmanager
def _written(definition: str) -> Iterator[str]:
    """A tokenizer.json for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="ablate-tokenizer-") as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(definition)
        yield str(path)


def _positions(model: Any) -> int | None:
    """Entries of a transformers model's table of positions; None where it has none."""
    sizes = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and ("position" in name or name.endswith("wpe"))
    ]
    named = getattr(model.config, "max_position_embeddings", None)
    return min([*sizes, named or sizes[0]]) if sizes else None


def _sampling(options: dict[str, Any]) -> Sampling:
    """lm-eval's generation options as ours; UserError for one that has no meaning here."""
    known = {"do_sample", "temperature", "top_p", "repetition_penalty"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(
            f"generation_kwargs: '{unknown[0]}' is not supported; "
            f"there are {', '.join(sorted(known))}"
        )
    given = {k: float(v) for k, v in options.items() if k != "do_sample"}
    if options.get("do_sample") is False:
        given["temperature"] = 0.0
    return Sampling(**given)


# --- finding -------------------------------------------------------------------------------------


def load(
    target: str, *, device: str = "auto", max_length: int | None = None, remote_code: bool = False
) -> Subject:
    """A run folder's trained model, or a transformers model from a folder or the hub.

    max_length: of a transformers model, as in `HFModel`. remote_code: run the code that comes with
    a transformers model. UserError says what is missing.
    """
    path = Path(target).expanduser()
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but there is no CUDA device here")
    if (path / "config.yaml").is_file():
        if max_length is not None or remote_code:
            raise UserError("max_length and remote_code are for transformers models only")
        return load_run(RunFolder(path), device=device)
    runs = [run.key for run in find_runs(path)]
    if runs:
        raise UserError(f"'{target}' is a study's folder: give one of its runs, {target}/{runs[0]}")
    if not path.exists() and (target[0] in "./~" or target.count("/") > 1):
        raise UserError(f"there is no folder '{target}'")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"'{target}' is neither a run folder (no config.yaml) nor a transformers model "
            "(no config.json)"
        )
    return _load_hf(target, device, max_length, remote_code)


def load_run(folder: RunFolder, *, device: str = "auto") -> OwnModel:
    """The model of a run folder with its newest weights; UserError when there are none."""
    tree = folder.config()
    if tree is None:
        raise UserError(f"'{folder.path}' is not a run folder: it has no readable config.yaml")
    cfg = config.load(config.override(tree, {"train.device": device}))
    place = device_of(cfg.train)
    weights = _weights(folder)
    tokenizer = _tokenizer(cfg, folder)
    model = LanguageModel(architecture_of(cfg, tokenizer), seed=None)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            found = tuple(weights[name].shape) if name in weights else "missing"
            if found != tuple(tensor.shape):
                raise UserError(
                    f"'{folder.path}': its weights do not fit its config and tokenizer: {name} is "
                    f"{found}, not {tuple(tensor.shape)}"
                )
            tensor.copy_(weights[name])
    return OwnModel(
        model.to(place).eval(),
        tokenizer,
        max_length=cfg.data.seq_len,
        name=folder.key,
        bf16=uses_bf16(cfg.train, place),
    )


def _tokenizer(cfg: config.Config, folder: RunFolder) -> Tokenizer:
    """The one that was kept with the weights; where none was, as the config makes it from the text,
    which must be there still."""
    if cfg.data.tokenizer.kind == "byte":
        return Tokenizer("byte")
    definition = folder.tokenizer()
    if definition is None:
        return tokenizers.load(cfg.data, corpus.sources(cfg.data)["text"])
    try:
        return Tokenizer("tokenizer.json", definition)
    except Exception as error:  # the package raises bare Exception for what it cannot parse
        raise UserError(f"'{folder.path}': its tokenizer.json cannot be read ({error})") from None


def _weights(folder: RunFolder) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        kept = folder.checkpoint / "model.safetensors"
        if kept.is_file():
            return load_file(kept)
        steps = checkpoint.steps(folder.checkpoint)
        if steps:
            return checkpoint.load(folder.checkpoint, steps[-1]).model
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"'{folder.path}': its weights cannot be read ({error})") from None
    raise UserError(
        f"'{folder.path}' has no weights to evaluate: train with train.keep=weights (or all)"
    )


def _load_hf(target: str, device: str, max_length: int | None, remote_code: bool) -> HFModel:
    try:
        import transformers
    except ImportError:
        raise UserError("transformers models need `pip install 'ablate-hybrids[eval]'`") from None
    make: Callable[..., Any] = transformers.AutoModelForCausalLM.from_pretrained
    place = "cuda" if device == "auto" and torch.cuda.is_available() else device
    try:
        model = make(target, dtype="auto", trust_remote_code=remote_code)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            target, trust_remote_code=remote_code
        )
    except Exception as error:  # of many libraries, and of code from elsewhere
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own, which remote_code=true would run"
        raise UserError(f"'{target}' cannot be loaded{offline}: {reason}") from None
    model = model.to("cpu" if place == "auto" else place)
    return HFModel(model, tokenizer, max_length=max_length, name=target)
