"""lm-eval calls a task's dataset without its name: one function a task."""

from __future__ import annotations

from functools import partial

from ablate.evaluate.recall import dataset

phonebook = partial(dataset, "phonebook")
phonebook_reversed = partial(dataset, "phonebook_reversed")
passkey = partial(dataset, "passkey")
needle = partial(dataset, "needle")
needle_multivalue = partial(dataset, "needle", values=3)
mqar_text = partial(dataset, "mqar_text")
induction = partial(dataset, "induction")
copying = partial(dataset, "copying")
