"""The profile for fast recovery: what it sets, and that it says what it costs."""

import os
import subprocess

import pytest

from tiered.ray_train.profile import DRIVER, HEAD, fast_recovery


def test_every_setting_is_quicker_than_the_default_and_tells_its_cost() -> None:
    for setting in (*HEAD, *DRIVER):
        assert float(setting.value) < float(setting.default)
        assert setting.gain
        assert setting.cost


def test_the_head_takes_them_as_variables_or_as_system_config() -> None:
    profile = fast_recovery()
    assert profile.head_environment["RAY_health_check_period_ms"] == "1000"
    assert profile.system_config["health_check_period_ms"] == 1000


def test_apply_leaves_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in DRIVER:
        monkeypatch.delenv(setting.name, raising=False)
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    fast_recovery().apply()
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
    assert os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] == "15"
    for setting in DRIVER:
        monkeypatch.delenv(setting.name)


def test_a_shell_can_source_the_file() -> None:
    script = f"set -a; eval '{fast_recovery().env_file().replace(chr(39), chr(34))}'; env"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, check=True, timeout=10
    )
    known = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    for setting in (*HEAD, *DRIVER):
        assert known[setting.name] == setting.value
