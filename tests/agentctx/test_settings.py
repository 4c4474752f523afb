import os
from pathlib import Path

import pytest

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Budget
from agentctx.settings import Settings


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder of its own, and no setting from the environment that runs the tests."""
    for name in [name for name in os.environ if name.startswith("AGENTCTX_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    (home / "config").mkdir(parents=True)
    monkeypatch.setenv("AGENTCTX_HOME", str(home))
    return home


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def user_file(home: Path, text: str, mode: int = 0o600) -> Path:
    path = home / "config" / "config.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_each_layer_beats_the_one_below(home: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = user_file(home, 'window = 1000\nmax_calls = 5\nmax_depth = 2\nmodel = "openai:x"\n')
    (project / "agentctx.toml").write_text(
        'max_calls = 2\nmax_depth = 2\nmax_seconds = 2\nmodel = "smollm2"\n'
    )
    monkeypatch.setenv("AGENTCTX_MAX_DEPTH", "3")
    monkeypatch.setenv("AGENTCTX_MAX_SECONDS", "3.5")
    settings = Settings.load({"max_seconds": 4.0, "max_calls": None}, cwd=project)
    assert (settings.window, settings.max_calls, settings.max_depth, settings.max_seconds) == (
        1000,
        2,
        3,
        4.0,
    )
    assert settings.model == "smollm2"
    assert settings.origin("window") == str(user)
    assert settings.origin("max_calls") == str(project / "agentctx.toml")
    assert settings.origin("max_depth") == "AGENTCTX_MAX_DEPTH"
    assert settings.origin("max_seconds") == "--max-seconds"
    assert settings.origin("strategy") == "default"
    assert settings.budget() == Budget(2, None, None, 4.0, 3)


def test_the_table_of_pyproject_counts_when_there_is_no_file_of_our_own(project: Path) -> None:
    (project / "pyproject.toml").write_text("[project]\nname = 'x'\n[tool.agentctx]\nmax_calls = 7\n")
    assert Settings.load({}, cwd=project).max_calls == 7
    (project / "agentctx.toml").write_text("")
    assert Settings.load({}, cwd=project).max_calls is None


def test_a_named_file_takes_the_place_of_both(home: Path, project: Path, tmp_path: Path) -> None:
    user_file(home, "max_calls = 1\n")
    (project / "agentctx.toml").write_text("max_depth = 1\n")
    named = tmp_path / "named.toml"
    named.write_text('base_url = "http://127.0.0.1:1/v1"\n')
    settings = Settings.load({}, named, project)
    assert (settings.max_calls, settings.max_depth) == (None, None)
    assert settings.base_url == "http://127.0.0.1:1/v1"
    with pytest.raises(ConfigError, match="cannot be read"):
        Settings.load({}, tmp_path / "absent.toml", project)


@pytest.mark.parametrize(
    "line",
    [
        'base_url = "http://evil.example/v1"',
        'api_key = "sk-1"',
        'model = "openai:gpt"',
        'model = "someone/on-a-hub"',
        'model = "gpt2"',
        'model = "~no-such-user/x"',
        "offline = false",
        "offline = 0",
        "ephemeral = false",
        'ephemeral = "no"',
        "kv_bytes = 1000000",
        "max_calls = 100000",
        'max_calls = "4"',
        "max_seconds = 2.5",
    ],
)
def test_a_project_file_may_not_send_text_away_or_loosen(home: Path, project: Path, line: str) -> None:
    user_file(home, "offline = true\nephemeral = true\nmax_calls = 3\nmax_seconds = 2\n")
    (project / "openai:gpt").mkdir()
    (project / "agentctx.toml").write_text(line + "\n")
    with pytest.raises(ConfigError, match="which a project's file may not") as caught:
        Settings.load({}, cwd=project)
    assert "sk-1" not in str(caught.value)


def test_a_project_file_may_tighten_and_may_name_a_folder(home: Path, project: Path) -> None:
    (project / "weights").mkdir()
    user_file(home, "max_calls = 3\n")
    (project / "agentctx.toml").write_text(
        'model = "weights"\noffline = true\nephemeral = 1\nmax_calls = 3\nmax_depth = 9\n'
    )
    settings = Settings.load({}, cwd=project)
    assert (settings.model, settings.offline, settings.ephemeral) == ("weights", True, True)
    assert (settings.max_calls, settings.max_depth) == (3, 9)


@pytest.mark.parametrize("text", ["tool = 5\n", "[tool]\nagentctx = 5\n"])
def test_a_table_that_is_none_is_an_error(project: Path, text: str) -> None:
    (project / "pyproject.toml").write_text(text)
    with pytest.raises(ConfigError, match="is 5, not a table"):
        Settings.load({}, cwd=project)


def test_a_misspelt_key_is_an_error_with_a_suggestion(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "agentctx.toml").write_text("max_cals = 3\n")
    with pytest.raises(ConfigError, match="'max_cals'") as caught:
        Settings.load({}, cwd=project)
    assert caught.value.hint == "did you mean 'max_calls'?"
    (project / "agentctx.toml").unlink()
    monkeypatch.setenv("AGENTCTX_MODLE", "x")
    with pytest.raises(ConfigError, match="AGENTCTX_MODLE") as caught:
        Settings.load({}, cwd=project)
    assert caught.value.hint == "did you mean 'model'?"


@pytest.mark.parametrize(
    ("text", "said"),
    [("max_calls = 0", "max_calls is 0"), ('window = "wide"', "window is 'wide'"), ("= 3", "not valid TOML")],
)
def test_a_bad_value_is_named_with_its_place(project: Path, text: str, said: str) -> None:
    (project / "agentctx.toml").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        Settings.load({}, cwd=project)
    assert "agentctx.toml" in str(caught.value)


def test_an_endpoint_is_asked_only_for_what_a_flag_says(
    home: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_file(home, 'kv_dtype = "int8"\nlinears = "int4"\nattention = "quest"\n')
    monkeypatch.setenv("AGENTCTX_EXACT", "true")
    kept = {"attention": "quest", "exact": True, "linears": "int4", "kv_dtype": "int8"}
    assert Settings.load({}, cwd=project).local() == kept
    assert Settings.load({"model": "openai:x"}, cwd=project).local() == {}
    asked = Settings.load({"model": "openai:x", "kv_dtype": "int8"}, cwd=project)
    assert asked.local() == {"kv_dtype": "int8"}


def test_a_key_is_never_shown_and_its_file_is_private(
    home: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTCTX_API_KEY", "sk-secret")
    settings = Settings.load({}, cwd=project)
    assert settings.api_key is not None and settings.api_key.get_secret_value() == "sk-secret"
    assert "sk-secret" not in repr(settings) and "sk-secret" not in settings.model_dump_json()
    user_file(home, 'api_key = "sk-user"\n')
    monkeypatch.delenv("AGENTCTX_API_KEY")
    Settings.load({}, cwd=project).export_key()
    assert os.environ["AGENTCTX_API_KEY"] == "sk-user"
    user_file(home, 'api_key = "sk-other"\n', 0o644)
    with pytest.raises(ConfigError, match="can be read by other users"):
        Settings.load({}, cwd=project)
    user_file(home, "api_key = 918273645\n")
    monkeypatch.delenv("AGENTCTX_API_KEY")
    with pytest.raises(ConfigError, match="api_key") as caught:
        Settings.load({}, cwd=project)
    assert "918273645" not in str(caught.value)


def test_the_weights_that_generate_are_a_setting(project: Path) -> None:
    (project / "agentctx.toml").write_text('linears = "int4"\n')
    assert Settings.load({}, cwd=project).linears == "int4"
    (project / "agentctx.toml").write_text('linears = "int3"\n')
    with pytest.raises(ConfigError, match="linears is 'int3'"):
        Settings.load({}, cwd=project)
