from __future__ import annotations

from pathlib import Path

import pytest

from ablate.bench import data as bench
from tests.data.conftest import make_documents, write_jsonl


def test_a_time_below_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.run(["--seconds", "-1"])
    assert "--seconds: -1 must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "code"), [(1e-6, 0), (1e9, 1)])
def test_bench_prints_every_shape_and_judges_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    code: int,
) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", make_documents(300))
    monkeypatch.setattr(bench, "FACTOR", factor)
    monkeypatch.setattr(bench, "WANTED", factor)
    monkeypatch.setattr(bench, "SHAPES", bench.SHAPES[:1] + bench.SHAPES[-1:])
    args = ["--seconds", "0.02", "--path", str(path), "--cache", str(tmp_path / "cache")]
    assert bench.run(args) == code
    out = capsys.readouterr().out
    assert out.count("yes" if code == 0 else "NO") >= 2
    assert "40% recall" in out
    assert "2048" in out
