"""The YAML of a group names every field of its section, with the section's own default."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ablate.config import EvaluateConfig, Section, TrackerConfig, TrainConfig

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.mark.parametrize(
    ("name", "section", "differs"),
    [
        ("train/default", TrainConfig, {"tokens"}),
        ("evaluate/default", EvaluateConfig, set()),
        ("tracker/wandb", TrackerConfig, set()),
        ("tracker/none", TrackerConfig, {"kind"}),
    ],
)
def test_yaml_is_the_section(name: str, section: type[Section], differs: set[str]) -> None:
    text = (CONF / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)
    assert list(values) == list(section.model_fields)
    for field, info in section.model_fields.items():
        if field not in differs:  # YAML 1.1 reads 3e-3 as text; the config's own loader does not
            value = values[field]
            assert (float(value) if isinstance(info.default, float) else value) == info.default
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all("#" in line for line in lines if not line.startswith("kind"))
