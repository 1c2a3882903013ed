"""A child whose memory holds one row of a training pass."""

from __future__ import annotations

from typing import Any

import torch

from ablate.model import LanguageModel
from ablate.study.child import main

if __name__ == "__main__":
    original = LanguageModel.loss

    def loss(self: LanguageModel, tokens_BL: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("reduction") == "sum" and len(tokens_BL) > 1:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return original(self, tokens_BL, *args, **kwargs)

    LanguageModel.loss = loss  # type: ignore[method-assign]
    main()
