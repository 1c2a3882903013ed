from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ablate.config import DataConfig
from ablate.data import prepare
from ablate.errors import UserError
from tests.data.conftest import data_config, make_documents


class FakeHub:
    """Stands for the package `datasets`: a stream of rows that counts how many were read."""

    def __init__(self, rows: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.rows, self.error, self.read, self.calls = rows, error, 0, 0
        self.arguments: dict[str, Any] = {}

    def load_dataset(self, name: str, subset: str | None, **options: Any) -> Iterator[Any]:
        self.calls += 1
        self.arguments = {"name": name, "subset": subset, **options}
        if self.error and not self.rows:
            raise self.error
        return self.stream()

    def stream(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            self.read += 1
            yield row
        if self.error:
            raise self.error


def use(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> FakeHub:
    module = types.ModuleType("datasets")
    module.load_dataset = hub.load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return hub


def config(tmp_path: Path, **fields: Any) -> DataConfig:
    hub = {"name": "some/text", "subset": "part", "revision": "abc"}
    return data_config(tmp_path, source="hub", **{"hub": hub, **fields})


def test_text_is_streamed_once_and_max_bytes_limits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": text, "id": i} for i, text in enumerate(make_documents(500))]
    hub = use(monkeypatch, FakeHub(rows))
    data = config(tmp_path, max_bytes=30_000)
    token_set = prepare(data)
    assert hub.arguments == {
        "name": "some/text",
        "subset": "part",
        "split": "train",
        "revision": "abc",
        "streaming": True,
    }
    assert hub.read < 200
    n_bytes = sum(split.n_bytes for split in token_set.splits.values())
    assert 30_000 <= n_bytes < 31_000
    assert prepare(data).fingerprint == token_set.fingerprint
    assert hub.calls == 1


def test_a_download_that_breaks_off_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": text} for text in make_documents(10)]
    use(monkeypatch, FakeHub(rows, ConnectionError("the line is dead\nlong trace")))
    with pytest.raises(UserError, match=r"data.hub.*some/text.*the line is dead\);") as caught:
        prepare(config(tmp_path))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache" / "hub").glob("*.zst"))
    hub = use(monkeypatch, FakeHub([{"text": text} for text in make_documents(100)]))
    assert prepare(config(tmp_path)).splits["train"].n_docs > 60
    assert hub.calls == 1


def test_no_network_no_package_no_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeHub([], OSError("no route to host")))
    with pytest.raises(UserError, match=r"data.hub.*no route to host.*data=stdlib"):
        prepare(config(tmp_path))
    use(monkeypatch, FakeHub([{"content": "x", "id": 1}]))
    with pytest.raises(UserError, match=r"data.hub.text_field is 'text'.*columns are content, id"):
        prepare(config(tmp_path))
    use(monkeypatch, FakeHub([]))
    with pytest.raises(UserError, match=r"no rows"):
        prepare(config(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ablate-hybrids\[hub\]'"):
        prepare(config(tmp_path))
