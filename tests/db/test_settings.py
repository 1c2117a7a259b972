"""Configuration: defaults, under the file, under the environment; every mistake named; secrets never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from db.errors import SettingsError
from db.settings import Settings, load_openrouter, load_settings

KEY = "sk-or-v1-very-secret"


def write(folder: Path, text: str) -> Path:
    (folder / "blueberry.toml").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENROUTER_API_KEY", "OPENROUTER_SITE_URL", "OPENROUTER_SITE_NAME", "BLUEBERRY_LAB"):
        monkeypatch.delenv(name, raising=False)


def test_defaults_are_those_of_the_seed(tmp_path: Path) -> None:
    settings = load_settings(tmp_path)
    assert (settings.auto_review_threshold, settings.auto_improve_threshold) == (7.0, 5.0)
    assert (settings.max_experiments_per_suggestion, settings.auto_start_runner) == (5, False)
    assert settings.gpu_optimization.model_dump() == {
        "max_batch_size": 32,
        "max_sequence_length": 1024,
        "max_experts": 16,
        "memory_safety_margin": 0.8,
    }


def test_environment_stands_above_the_file_key_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path,
        "auto_review_threshold = 6.5\nmin_seeds = 3\n[runner]\ndevice = 'cpu'\nthreads = 3\n[baseline]\nlr = 0.1\n",
    )
    monkeypatch.setenv("BLUEBERRY_AUTO_REVIEW_THRESHOLD", "8.5")
    monkeypatch.setenv("BLUEBERRY_RUNNER__THREADS", "1")
    monkeypatch.setenv("BLUEBERRY_LAB", str(tmp_path))
    settings = load_settings(tmp_path)
    assert (settings.auto_review_threshold, settings.min_seeds) == (8.5, 3)
    assert (settings.runner.device, settings.runner.threads, settings.runner.max_failures) == ("cpu", 1, 2)
    assert settings.baseline == {"lr": 0.1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("auto_reviw_threshold = 7", "unknown key 'auto_reviw_threshold'"),
        ("[runner]\nspeed = 1", "unknown key 'runner.speed'"),
        ("[gpu_optimisation]\nmax_experts = 8", "unknown key 'gpu_optimisation'"),
        ("auto_review_threshold = 11", "auto_review_threshold=11: Input should be less than or equal to 10"),
        ("auto_review_threshold = nan", "auto_review_threshold=nan"),
        ("[gpu_optimization]\nmemory_safety_margin = 0", "gpu_optimization.memory_safety_margin=0"),
        ("[runner]\ndevice = 'tpu'", "runner.device='tpu': Input should be 'auto', 'cpu' or 'cuda'"),
        ("runner = 3", "runner=3"),
        ("auto_review_threshold = 4.0", "auto_improve_threshold must not be above auto_review_threshold"),
        ("min_seeds = 5", "min_seeds must not be above max_seeds"),
        ("auto_review_threshold = ", "is not valid TOML"),
        ("a = 1\na = 2", "is not valid TOML"),
    ],
)
def test_mistake_in_the_file_is_named_with_the_file(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(write(tmp_path, text))

    assert said in str(caught.value)
    assert "blueberry.toml" in str(caught.value)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "blueberry.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="is not valid TOML"):
        load_settings(tmp_path)

    (tmp_path / "blueberry.toml").unlink()
    (tmp_path / "blueberry.toml").mkdir()
    with pytest.raises(SettingsError, match=r"blueberry\.toml cannot be read: Is a directory"):
        load_settings(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BLUEBERRY_AUTO_REVIW_THRESHOLD", "7", "unknown environment variable BLUEBERRY_AUTO_REVIW_THRESHOLD"),
        ("BLUEBERRY_RUNNER__SPEED", "7", "unknown environment variable BLUEBERRY_RUNNER__SPEED"),
        ("BLUEBERRY_MIN_SEEDS", "many", "min_seeds='many'"),
        ("BLUEBERRY_RUNNER__LEASE_SECONDS", "0.1", "runner.lease_seconds='0.1'"),
        ("BLUEBERRY_RUNNER", "{", "an environment variable cannot be read"),
    ],
)
def test_mistake_in_the_environment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path)

    assert said in str(caught.value)


def test_settings_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings(tmp_path).min_seeds = 3  # type: ignore[misc]


def test_secret_of_the_dotenv_file_and_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_openrouter(tmp_path).api_key is None
    path = tmp_path / ".env"
    path.write_text(f"OPENROUTER_API_KEY={KEY}\nOPENROUTER_SITE_NAME=lab\nOTHER=1\n")
    path.chmod(0o640)
    with pytest.raises(SettingsError, match=r"can be read by others; run: chmod 600") as caught:
        load_openrouter(tmp_path)

    assert KEY not in str(caught.value)
    path.chmod(0o600)
    access = load_openrouter(tmp_path)
    assert access.api_key is not None
    assert (access.api_key.get_secret_value(), access.site_name) == (KEY, "lab")

    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-from-the-environment")
    other = load_openrouter(tmp_path)
    assert other.api_key is not None
    assert other.api_key.get_secret_value() == "sk-from-the-environment"


def test_empty_key_is_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "")
    assert load_openrouter(tmp_path).api_key is None


def test_secret_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
    access = load_openrouter(tmp_path)
    for text in (repr(access), str(access), repr(access.model_dump()), access.model_dump_json()):
        assert KEY not in text

    for name in ("openrouter_api_key", "api_key"):
        with pytest.raises(SettingsError) as caught:
            load_settings(write(tmp_path, f'{name} = "{KEY}"\n'))

        assert KEY not in str(caught.value)

    assert "api_key" not in Settings.model_fields
