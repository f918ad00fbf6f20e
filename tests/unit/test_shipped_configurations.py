"""The configuration files in deploy/: they can be used as they are, and they name every key that there is."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from common import config

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"
SHIPPED = {
    "qemu": config.QemuConfig,
    "clh": config.ClhConfig,
    "fc": config.FirecrackerConfig,
}


def loaded(name: str, tmp_path: Path, *, is_default_shown: bool) -> config.KataConfig:
    """Load a shipped file on a host that has all the files that it names; perhaps with every default set."""
    text = (DEPLOY / f"configuration-{name}.toml").read_text()
    if is_default_shown:
        text = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    for path in re.findall(r'= "(/[^"]+)"', text):
        (tmp_path / Path(path).name).touch()
        text = text.replace(path, str(tmp_path / Path(path).name))
    file = tmp_path / "configuration.toml"
    file.write_text(text)
    return config.load(str(file))


@pytest.mark.parametrize(("name", "kind"), SHIPPED.items())
def test_it_can_be_used_as_it_is_and_what_it_shows_is_the_default(
    tmp_path: Path, name: str, kind: type[config.HypervisorSection]
) -> None:
    used, shown = (loaded(name, tmp_path, is_default_shown=is_shown) for is_shown in (False, True))
    assert type(used.hypervisor) is kind
    assert used.ignored == shown.ignored == ()
    assert used == shown


@pytest.mark.parametrize(("name", "kind"), SHIPPED.items())
def test_it_names_every_key(name: str, kind: type[config.HypervisorSection]) -> None:
    text = (DEPLOY / f"configuration-{name}.toml").read_text()
    sections = (kind, config.AgentConfig, config.RuntimeConfig)
    keys = {field.name for section in sections for field in msgspec.structs.fields(section)}
    named = set(re.findall(r"^(?:# )?(\w+) = ", text, flags=re.MULTILINE))
    assert named == keys
