"""A Hub on this machine and a checkpoint to push, for tests that publish."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_cases import copy_checkpoint, make_checkpoint, use_hub
from hub_server import TOKEN, HubServer, running_hub
from huggingface_hub.utils import _http


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made"))


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return copy_checkpoint(made, tmp_path)


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture
def hub(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[HubServer]:
    """An empty Hub that the client talks to; no test may let the token into a log or a file."""
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "hf_hadacore"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        caplog.set_level(logging.DEBUG, logger=name)
    server.reset()
    use_hub(server.url, monkeypatch, tmp_path / "home")
    yield server
    assert TOKEN not in caplog.text
    for repository in server.repositories.values():
        for files in repository.commits.values():
            assert not any(TOKEN.encode() in data for data in files.values())
