"""The `data` group's files name fields that exist, with the defaults that the code has."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ablate.config import DataConfig, fields

CONF = Path(__file__).resolve().parents[2] / "conf"


def composed(name: str, *overrides: str) -> DataConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = compose(overrides=[f"+data={name}", *overrides])
    return DataConfig.model_validate(OmegaConf.to_container(tree.data))


def test_base_holds_every_field_with_its_default() -> None:
    base = OmegaConf.to_container(OmegaConf.load(CONF / "data" / "base.yaml"))
    assert base == DataConfig().model_dump()
    assert isinstance(base, dict)
    assert {name.split(".")[0] for name, _, _ in fields(DataConfig)} == set(base)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("stdlib", "stdlib"),
        ("hub", "hub"),
        ("fineweb_edu", "hub"),
        ("slimpajama", "hub"),
    ],
)
def test_each_group_file_is_a_valid_config(name: str, source: str) -> None:
    assert composed(name).source == source


def test_files_takes_a_path() -> None:
    assert composed("files", "data.path=some/folder").path == "some/folder"
    assert composed("files", "data.path=[a,b]").path == ["a", "b"]
