"""What tests of publishing share: the command, a checkpoint, and where the client finds its Hub."""

import shutil
from pathlib import Path

import pytest
from evaluation_cases import word_tokenizer
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from tiny_models import make_model
from typer.testing import CliRunner, Result

from hf_hadacore import HadaCoreConfig
from hf_hadacore.cli import app
from hf_hadacore.offline.checkpoint import quantize_checkpoint

# Of `make_checkpoint`.
SHARDS = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert TOKEN not in result.output
    return result


def make_checkpoint(folder: Path, name: str = "llama", *, max_shard_size: str = "20KB") -> Path:
    """A sharded int4 checkpoint with a tokenizer in `folder / "int4"`, from `folder / "src"`."""
    make_model(name).save_pretrained(folder / "src")
    word_tokenizer().save_pretrained(folder / "src")
    (folder / "src" / "LICENSE").write_text((Path(__file__).parents[1] / "LICENSE").read_text())
    quantize_checkpoint(
        folder / "src", folder / "int4", HadaCoreConfig(), max_shard_size=max_shard_size, progress=False
    )
    return folder / "int4"


def copy_checkpoint(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "int4"))


def use_hub(url: str, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Let the client in this process talk to a Hub, with an empty cache and without this machine's token."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    # Xet's protocol is not HTTP that a test could answer.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def transfers(hub: HubServer) -> list[str]:
    """The LFS objects that were sent, in their order."""
    return [path for method, path in hub.requests if method == "PUT"]


def pushed_files(hub: HubServer, revision: str = "main") -> set[str]:
    return set(hub.repositories["user/int4"].files(revision)) - {".gitattributes"}
