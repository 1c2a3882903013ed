"""lm-eval in process: a subject as an `lm_eval.api.model.LM`.

What an item scores is lm-eval's own definition, that of its `hf` model: the same split of context
and continuation, the same truncation on the left, the same windows of a long document, the same
stop strings. What differs is how: texts are encoded together, inputs that several choices share run
once, a batch holds rows of like length up to a number of tokens, only scored positions are
projected to the vocabulary, and log-softmax is in float32.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from ablate.errors import UserError
from ablate.evaluate.subjects import Subject
from ablate.model.generate import padded_length

Request = tuple[Any, list[int], list[int]]  # (text, context ids, continuation ids)
UNLIMITED = 1 << 30


class SubjectLM(TemplateLM):
    """A subject for `lm_eval.evaluator.evaluate`.

    batch_tokens: rows × longest row of a batch at most (one row may be longer).
    batch_size: rows at most of a batch that is continued, as each holds caches.
    quiet: no progress bars; None: where stderr is not a terminal.
    check: called before every batch, and may raise to stop.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        batch_size: int = 256,
        batch_tokens: int = 16384,
        quiet: bool | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.subject = subject
        self.max_length = subject.max_length
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.quiet = not sys.stderr.isatty() if quiet is None else quiet
        self.check = check
        self._device = subject.device
        self._encoded: dict[tuple[str, bool], list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        return int(self.subject.eos_id)

    @property
    def prefix_token_id(self) -> int:
        return int(self.subject.prefix_id)

    @property
    def tokenizer_name(self) -> str:
        return self.subject.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        special = add_special_tokens is not False
        found = self._encoded.get((string, special))
        return self.subject.encode([string], special=special)[0] if found is None else found

    # --- log-likelihoods -----------------------------------------------------------------------

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """lm-eval encodes context by context; here all texts that it will ask for are encoded
        first, which the tokenizer does on every core, and each only once."""
        pairs = [request.args for request in requests]
        heads = {c.rstrip(): None for c, _ in pairs if c}
        wholes = dict.fromkeys(c + continuation for c, continuation in pairs if c)
        alone = dict.fromkeys(continuation for c, continuation in pairs if not c)
        for texts, special in (([*{**heads, **wholes}], True), ([*alone], False)):
            ids = self.subject.encode(texts, special=special)
            self._encoded |= {(t, special): i for t, i in zip(texts, ids, strict=True)}
        try:
            return super().loglikelihood(requests, disable_tqdm=self.quiet or disable_tqdm)
        finally:
            self._encoded = {}

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy) of each continuation."""
        users: dict[tuple[int, ...], list[int]] = {}  # an input, and the requests that read it
        for i, (_, context, continuation) in enumerate(requests):
            limit = self.max_length
            if len(continuation) > limit:
                if self.subject.bounded:
                    raise UserError(
                        f"a continuation of {len(continuation)} tokens is longer than the model's "
                        f"{limit}"
                    )
                limit = len(continuation)
            ids = (context + continuation)[-(limit + 1) :][:-1]
            users.setdefault(tuple(ids), []).append(i)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        ordered = sorted(users, key=lambda ids: (-len(ids), ids))
        bar = self._bar(len(requests), "log-likelihoods", disable_tqdm)
        for batch in self._batches(ordered, len, len(ordered)):
            targets = [[requests[i][2] for i in users[ids]] for ids in batch]
            for ids, found in zip(batch, self._score(batch, targets), strict=True):
                for i, answer in zip(users[ids], found, strict=True):
                    answers[i] = answer
                bar.update(len(users[ids]))
        bar.close()
        return answers

    def _score(
        self, batch: Sequence[tuple[int, ...]], targets: list[list[list[int]]]
    ) -> list[list[tuple[float, bool]]]:
        """For each row the scores of several continuations that end where the row's output does."""
        width = len(batch[0])
        width = max(width, min(padded_length(width), self.max_length))
        tokens_BL = torch.zeros(len(batch), width, dtype=torch.long)
        keep_BL = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, (ids, wanted) in enumerate(zip(batch, targets, strict=True)):
            tokens_BL[row, : len(ids)] = torch.tensor(ids)
            keep_BL[row, len(ids) - max(map(len, wanted)) : len(ids)] = True
        counts = keep_BL.sum(1)
        # what is asked of each kept position: (position, token) of every continuation
        starts = counts.cumsum(0) - counts
        position: list[int] = []
        token: list[int] = []
        for row, wanted in enumerate(targets):
            end = int(starts[row] + counts[row])
            for continuation in wanted:
                position += range(end - len(continuation), end)
                token += continuation
        device = self.subject.device
        place, wanted_id = (torch.tensor(x, device=device) for x in (position, token))
        chosen = torch.empty(len(position), device=device, dtype=torch.float32)
        greedy = torch.empty(len(position), device=device, dtype=torch.bool)
        first = 0
        for logits in self.subject.logits(tokens_BL.to(device), keep_BL.to(device)):
            here = ((place >= first) & (place < first + len(logits))).nonzero()[:, 0]
            log_p = torch.log_softmax(logits.float(), -1)
            rows, ids_here = place[here] - first, wanted_id[here]
            chosen[here] = log_p[rows, ids_here]
            greedy[here] = log_p.argmax(-1)[rows] == ids_here
            first += len(logits)
        sizes = [len(continuation) for wanted in targets for continuation in wanted]
        parts = zip(chosen.cpu().split(sizes), greedy.cpu().split(sizes), strict=True)
        scores = ((float(p.sum()), bool(g.all())) for p, g in parts)
        return [list(itertools.islice(scores, len(wanted))) for wanted in targets]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        owner: list[int] = []
        texts = [request.args[0] for request in requests]
        encoded = self.subject.encode(texts, special=self.subject.rolls_special)
        for i, ids in enumerate(encoded):
            pieces = utils.get_rolling_token_windows(
                token_list=ids,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for piece in pieces:
                context, continuation = utils.make_disjoint_window(piece)
                windows.append((None, context, continuation))
                owner.append(i)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (value, _) in zip(owner, scores, strict=True):
            totals[i] += value
        return totals

    # --- generation ----------------------------------------------------------------------------

    @torch.no_grad()
    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}  # requests with the same options run together
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        answers = [""] * len(requests)
        bar = self._bar(len(requests), "generations", disable_tqdm)
        for members in groups.values():
            options: dict[str, Any] = dict(normalize_gen_kwargs(requests[members[0]].args[1], 256))
            n_tokens = int(options.pop("max_gen_toks"))
            eos = self.subject.decode([self.eot_token_id])
            until = handle_stop_sequences(options.pop("until", None), eos=eos or None)
            room = self.max_length - n_tokens
            if room <= 0 and not self.subject.bounded:
                room = self.max_length // 2  # the answer ends beyond the training length
            if room <= 0:
                raise UserError(
                    f"max_gen_toks is {n_tokens}, not less than the model's {self.max_length}"
                )
            encoded = self.subject.encode([requests[i].args[0] for i in members])
            prompts = {i: ids[-room:] for i, ids in zip(members, encoded, strict=True)}
            ordered = sorted(members, key=lambda i: (-len(prompts[i]), prompts[i]))
            lengths = {i: len(prompts[i]) + n_tokens for i in members}
            for batch in self._batches(ordered, lengths.__getitem__, self.batch_size):
                rows = [prompts[i] for i in batch]
                texts = self.subject.generate(rows, n_tokens, until, dict(options))
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = postprocess_generated_text(text, until, None)
                bar.update(len(batch))
        bar.close()
        return answers

    # --- batches -------------------------------------------------------------------------------

    def _batches(
        self, ordered: Sequence[Any], length: Callable[[Any], int], rows: int
    ) -> Iterator[list[Any]]:
        """Neighbours of a list ordered by falling length, at most `rows` of them."""
        batch: list[Any] = []
        for item in ordered:
            full = batch and (len(batch) + 1) * length(batch[0]) > self.batch_tokens
            if full or len(batch) == rows:
                self.check()
                yield batch
                batch = []
            batch.append(item)
        if batch:
            self.check()
            yield batch

    def _bar(self, total: int, what: str, off: bool) -> Any:
        return tqdm(total=total, desc=what, disable=self.quiet or off, leave=False)
