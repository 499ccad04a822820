"""Settings: defaults, the file, the environment, and what is said about mistakes in either."""

from __future__ import annotations

from pathlib import Path

import pytest

from fireclaw.config import Config, load_config, settings_table
from fireclaw.errors import ConfigError
from fireclaw.paths import Home

DOCS = Path(__file__).parents[2] / "docs/configuration.md"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home whose configuration file can be written."""
    return Home(tmp_path, tmp_path / "run", tmp_path)


def test_no_file_is_the_defaults(home: Home) -> None:
    """Without a file and variables every setting has its default."""
    config = load_config(home, {})

    assert config == Config()
    assert (config.machine.memory_mib, config.irc.port, config.daemon.idle_minutes) == (256, 6667, 10)


def test_environment_wins_over_file_wins_over_default(home: Home) -> None:
    """A variable beats the file, the file beats the default, key by key."""
    home.config_file.write_text('[irc]\nport = 7000\n[model]\nname = "m"\n\napi_key_file = "/key"\n')

    config = load_config(home, {"FIRECLAW_IRC_PORT": "0", "FIRECLAW_MACHINE_ACCEL": "tcg", "FIRECLAW_HOME": "/x"})

    assert (config.irc.port, config.model.name) == (0, "m")
    assert config.machine.accel == "tcg"
    assert config.machine.memory_mib == 256
    assert config.model.api_key_file == Path("/key")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[irc]\n\nprot = 1", "line 3: unknown key 'irc.prot'", "did you mean 'port'?"),
        ("[ircd]\nport = 1", "line 1: unknown section [ircd]", "did you mean 'irc'?"),
        ("port = 1", "line 1: unknown section [port]", "known: machine, images, irc, model, daemon"),
        ("irc.prot = 1", "line 1: unknown key 'irc.prot'", "did you mean 'port'?"),
        ("\nirc = {prot = 1}", "line 2: unknown key 'irc.prot'", "did you mean 'port'?"),
        ("[irc]\n'zzz' = 1", "line 2: unknown key 'irc.zzz'", "known: port"),
        ("[irc.port]\nx = 1", "line 1: irc.port must be a valid integer", ""),
        ("irc = 5", "line 1: irc must be a section: [irc]", ""),
        ("[model]\nname='a'\n[irc]\nport = '1'", "line 4: irc.port must be a valid integer, not '1'", ""),
        ("[irc]\nport = 99999", "line 2: irc.port must be less than or equal to 65535, not 99999", ""),
        ("[machine]\naccel = 'fast'", "line 2: machine.accel must be 'auto', 'kvm' or 'tcg', not 'fast'", ""),
        ("[machine]\nmemory_mib = true", "line 2: machine.memory_mib must be a valid integer, not True", ""),
        ("[model]\nbase_url = 'localhost'", "line 2: model.base_url must match pattern", ""),
        ("[model]\napi_key_file = 'key'", "line 2: model.api_key_file must be an absolute path", ""),
        ("[model]\napi_key_file = 1", "line 2: model.api_key_file must be an absolute path", ""),
        ("[irc]\nport = \n", "line 2: not TOML: Invalid value", "see docs/configuration.md for examples"),
        ("[irc]\nport = 1\nport = 2", "line 3: not TOML: Cannot overwrite a value", "see docs/configuration.md"),
        ("a = '''\n\nx", "line 3: not TOML: Expected", "see docs/configuration.md"),
    ],
)
def test_mistakes_in_the_file_are_placed(home: Home, text: str, message: str, hint: str) -> None:
    """A mistake is reported with file, line, key, what was expected, and the nearest key where one is near."""
    home.config_file.write_text(text)

    with pytest.raises(ConfigError) as refused:
        load_config(home, {})

    assert refused.value.message.startswith(f"{home.config_file}, {message}")
    assert refused.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("variable", "value", "message", "hint"),
    [
        ("FIRECLAW_IRC_PORT", "abc", "must be a valid integer, unable to parse string as an integer, not 'abc'", ""),
        ("FIRECLAW_IRC_PROT", "1", "no such setting", "did you mean 'FIRECLAW_IRC_PORT'?"),
        ("FIRECLAW_MACHINE_ACCEL", "", "must be 'auto', 'kvm' or 'tcg', not ''", ""),
    ],
)
def test_mistakes_in_the_environment_are_named(home: Home, variable: str, value: str, message: str, hint: str) -> None:
    """A wrong variable is reported by its own name."""
    with pytest.raises(ConfigError) as refused:
        load_config(home, {variable: value})

    assert refused.value.message.startswith(f"environment variable {variable}: ")
    assert message in refused.value.message
    assert refused.value.hint == hint


def test_other_variables_are_nobodys_business(home: Home) -> None:
    """A variable that names no section is not ours to judge."""
    assert load_config(home, {"FIRECLAW_HOME": "/x", "FIRECLAW_TEST_HOME": "/y", "PORT": "1"}) == Config()


def test_unreadable_files_are_refused_with_the_reason(home: Home) -> None:
    """A folder, bytes that are not UTF-8, and a file without end are each refused."""
    home.config_file.write_bytes(b"# fine\n\xff\n")
    with pytest.raises(ConfigError, match=r"fireclaw\.toml, line 2: not UTF-8"):
        load_config(home, {})

    home.config_file.unlink()
    home.config_file.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        load_config(home, {})

    home.config_file.unlink()
    home.config_file.mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*fireclaw\.toml: Is a directory"):
        load_config(home, {})


def test_docs_hold_the_table() -> None:
    """docs/configuration.md ends with the table that the settings themselves make."""
    assert DOCS.read_text().endswith(settings_table()), "run 'python -m fireclaw.config' and put its output there"
