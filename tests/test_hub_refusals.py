"""What cannot be pushed: one line that says why, and a Hub on which nothing is new."""

import json
import os
import socket
from pathlib import Path

import huggingface_hub
import pytest
from hub_cases import SHARDS, copy_checkpoint, pushed_files, run, transfers
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from hf_hadacore.errors import CheckpointError, EvaluationError, HubError
from hf_hadacore.publishing.hub import files_to_push, push
from hf_hadacore.publishing.model_card import write_card


def refused(hub: HubServer, *arguments: object) -> str:
    """The one line of a push that fails; nothing is new on the Hub, but for an empty repository at most."""
    before = {name: list(repository.commits) for name, repository in hub.repositories.items()}
    result = run("push", *arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    after = {name: list(repository.commits) for name, repository in hub.repositories.items()}
    assert after == {name: after[name][:1] for name in after} and before.items() <= after.items()
    return line.removeprefix("error: ")


def test_no_token(hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert refused(hub, checkpoint, "user/int4") == (
        "there is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN"
    )
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["int4", "user/int4", "user/taken"])
def test_wrong_token(hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, repo: str) -> None:
    hub.add_repository("user/taken", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = refused(hub, checkpoint, repo)
    assert "the Hub does not accept the token; log in again with `hf auth login`" in line
    assert "hf_wrong" not in line


def test_a_token_that_the_transport_would_quote(checkpoint: Path, hub: HubServer) -> None:
    with pytest.raises(HubError, match="holds blanks or other characters") as caught:
        push(checkpoint, "user/int4", token=f"{TOKEN}\nX-Other: 1")
    assert TOKEN not in str(caught.getrepr(chain=True))


@pytest.mark.parametrize("exists", [True, False])
def test_no_permission(hub: HubServer, checkpoint: Path, exists: bool) -> None:
    if exists:
        hub.add_repository("org/int4", private=False)
    line = refused(hub, checkpoint, "org/int4")
    assert line.startswith("org/int4: the token has no permission to write; it needs the role 'write'")


def test_the_name_of_another_model(hub: HubServer, checkpoint: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "big.gguf"):
        hub.add_repository("user/int4", private=True, files={name: b"1", "config.json": b"{}"})
        line = refused(hub, checkpoint, "user/int4")
        assert line.startswith(
            f"user/int4: the name is taken by another model ({name}), which is not replaced"
        )
        assert refused(hub, checkpoint, "user/int4", "--revision", "main") == line


def test_a_name_that_is_taken_meanwhile(
    hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = huggingface_hub.HfApi.create_repo
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "create_repo",
        lambda *args, **kwargs: (create(*args, **kwargs), create(*args, **kwargs)),
    )
    assert run("push", checkpoint, "user/int4").stderr.endswith("the name is taken; choose another one\n")


def test_a_repository_that_changes_meanwhile(hub: HubServer, checkpoint: Path) -> None:
    hub.add_repository("user/int4", private=True)

    def someone_else(method: str, path: str) -> None:
        if "/commit/" in path:
            hub.repositories["user/int4"].commit({"theirs.txt": b""}, "main", "theirs")

    hub.faults.append(someone_else)
    result = run("push", checkpoint, "user/int4")
    assert result.stderr.endswith("the repository has changed during the upload; look at it and push again\n")
    assert pushed_files(hub) == {"theirs.txt"}


def test_no_network(hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    line = refused(hub, checkpoint, "user/int4")
    assert line.startswith("user/int4: the Hub cannot be reached, and nothing has changed there")
    assert "refused" in line


def test_quantize_and_push_without_a_token_stops_at_once(
    hub: HubServer, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = run("quantize", made.parent / "src", tmp_path / "new", "--push", "user/int4")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: there is no token for the Hub")
    assert not (tmp_path / "new").exists()


def test_offline_mode(hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()  # those that exist were made for being online
    assert refused(hub, checkpoint, "user/int4") == "user/int4: the Hub is switched off; unset HF_HUB_OFFLINE"
    close_session()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("user/what?",), "is no name of a repository, owner/name"),
        (("user/int4", "--create-pr"), "there is no such repository, or the token may not see it"),
        (("user/int4", "--create-pr", "--revision", "x"), "create_pr and revision exclude each other"),
        (("user/taken", "--revision", "refs/pr/7"), "there is no such revision"),
    ],
)
def test_targets_that_cannot_be(
    hub: HubServer, checkpoint: Path, arguments: tuple[str, ...], message: str
) -> None:
    hub.add_repository("user/taken", private=True)
    assert message in refused(hub, checkpoint, *arguments)


def test_metadata_that_the_hub_refuses(hub: HubServer, checkpoint: Path) -> None:
    write_card(checkpoint, license_id="other")
    line = refused(hub, checkpoint, "user/int4")
    assert line.endswith("license 'other' needs license_name and license_link")
    assert transfers(hub) == []


def test_a_folder_that_is_no_checkpoint(hub: HubServer, made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "absent", "found no config.json"),
        (tmp_path / "empty", "found no config.json"),
        (made.parent / "src", "is no hadacore checkpoint (quant_method None)"),
    ):
        assert message in refused(hub, folder, "user/int4")
    assert hub.requests == []


def test_a_damaged_checkpoint_is_not_sent(hub: HubServer, made: Path, tmp_path: Path) -> None:
    def change(file: Path, old: str, new: str) -> None:
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    for i, (name, damage, message) in enumerate(
        (
            (SHARDS[1], lambda file: os.truncate(file, 5000), "truncated"),
            (SHARDS[2], lambda file: file.unlink(), "shard is missing"),
            ("model.safetensors.index.json", lambda file: file.write_text("{}"), "weight_map"),
            (
                "config.json",
                lambda file: change(file, '"group_size": 128', '"group_size": 32'),
                "contradicts",
            ),
            ("config.json", lambda file: change(file, '"silu"', '"none"'), "no model can be built"),
        )
    ):
        folder = copy_checkpoint(made, tmp_path / str(i))
        damage(folder / name)
        with pytest.raises(CheckpointError, match=message):
            push(folder, "user/int4")
    assert hub.requests == []


def test_an_evaluation_of_another_model(hub: HubServer, checkpoint: Path) -> None:
    file = checkpoint / "evaluation.json"
    report = {"schema": "hadacore-evaluation/1", "model": {"name": "other", "files": {}}}
    file.write_text(json.dumps(report))
    assert "is of other, whose weights are not those in" in refused(hub, checkpoint, "user/int4")
    file.write_text("{}")
    with pytest.raises(EvaluationError, match="is no evaluation"):
        files_to_push(checkpoint)
    assert hub.requests == []
