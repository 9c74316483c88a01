"""How a bad input is tried: in this process, in a folder of its own, on devices that are there."""

import logging
import pathlib
from collections.abc import Callable

import pytest
from bad_inputs import Bad, assert_refused, everything_in, launch

from launcher import main
from launcher.errors import ConfigError
from launcher.models.model import Model


@pytest.fixture(autouse=True)
def on_the_devices_at_hand(no_new_backend: None) -> None:
    """All of them are tried in this process."""


@pytest.fixture(autouse=True)
def keep_log_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra closes all handlers when it sets up logging; absl's closes pytest's stderr with it."""
    monkeypatch.setattr(logging, "_handlerList", [])


_MODELS: dict[str, Model] = {}


@pytest.fixture(autouse=True)
def build_each_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most inputs are found bad when the model is there, and most of them want the same one."""
    build = main.build_model

    def build_once(config, cluster, given, *, emulated):
        key = repr(
            (config.model, config.runtime.name, cluster.name, emulated, given and given.model)
        )
        if key not in _MODELS:
            _MODELS[key] = build(config, cluster, given, emulated=emulated)
        return _MODELS[key]

    monkeypatch.setattr(main, "build_model", build_once)


@pytest.fixture
def refuse(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Bad], None]:
    """Check that a bad input ends as all must, and leaves the folder as it was.

    Only what is wrong about the user's input promises that; a run whose files are damaged has a folder.
    """

    def check(case: Bad) -> None:
        case.lay_out(tmp_path)
        before = everything_in(tmp_path)
        assert_refused(case, launch(case.arguments, tmp_path, capsys, monkeypatch))
        after = everything_in(tmp_path)
        if case.status != ConfigError.exit_status:
            after = {path: kind for path, kind in after.items() if not path.startswith("outputs")}
        assert after == before

    return check
