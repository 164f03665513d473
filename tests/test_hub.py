"""Pushing over real HTTP, with the real client, to a Hub on this machine."""

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_cases import copy_checkpoint, make_checkpoint, run, transfers, use_hub
from hub_server import TOKEN, HubServer, running_hub
from huggingface_hub import constants
from huggingface_hub.utils import _http, close_session
from tiny_models import make_model, token_ids
from transformers import AutoModelForCausalLM

from hf_hadacore import HadaCoreConfig
from hf_hadacore.errors import CheckpointError, EvaluationError, HubError
from hf_hadacore.offline.checkpoint import quantize_checkpoint
from hf_hadacore.publishing.hub import files_to_push, push
from hf_hadacore.publishing.model_card import card_of, is_generated, write_card

SHARDS = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
PUSHED = {
    *SHARDS,
    "LICENSE",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "quantization_report.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


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


def pushed_files(hub: HubServer, revision: str = "main") -> set[str]:
    return set(hub.repositories["user/int4"].files(revision)) - {".gitattributes"}


def logits_of(source: str | Path) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(source)(token_ids()).logits


@pytest.mark.transformers_versions
def test_loads_elsewhere_with_the_same_logits(hub: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    result = run("push", checkpoint, "user/int4")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().startswith(f"{hub.url}/user/int4/commit/")
    assert pushed_files(hub) == PUSHED
    script = (
        "import sys, torch, hf_hadacore\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('user/int4')\n"
        "ids = AutoTokenizer.from_pretrained('user/int4')('w3 w4', return_tensors='pt').input_ids\n"
        "torch.save((ids, model(ids).logits.detach()), sys.argv[1])\n"
    )
    elsewhere = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "elsewhere"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "logits.pt")],
        env={**os.environ, **elsewhere, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    ids, logits = torch.load(tmp_path / "logits.pt")
    assert ids.tolist() == [[3, 4]]
    assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits)


@pytest.mark.transformers_versions
@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("llama-tied", {}), ("llama-tied", {"quantize_lm_head": True}), ("mixtral", {})],
)
def test_push_to_hub_of_a_model(hub: HubServer, name: str, options: dict[str, bool], tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "src")
    config = HadaCoreConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "src", quantization_config=config)
    model.push_to_hub("user/int4", max_shard_size="20KB")
    files = hub.repositories["user/int4"].files()
    index = json.loads(files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == {n for n in files if n.endswith(".safetensors")}
    assert json.loads(files["config.json"])["quantization_config"]["quant_method"] == "hadacore"
    with torch.inference_mode():
        assert torch.equal(logits_of("user/int4"), model(token_ids()).logits)


def test_everything_needed_and_nothing_else(hub: HubServer, checkpoint: Path) -> None:
    for name in (
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "NOTICE",
        ".env",
        ".hidden.json",
        ".cache/data.json",
        "journal.jsonl",
        "pytorch_model.bin",
        "optimizer.pt",
        "modeling_own.py",
        "notes.md",
        "adapter.safetensors",
        "int4.partial/config.json",
        "runs/log.txt",
    ):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("x")
    push(checkpoint, "user/int4")
    needed = {"chat_template.jinja", "additional_chat_templates/tools.jinja", "NOTICE"}
    assert pushed_files(hub) == PUSHED | needed
    for name in PUSHED - {"README.md"}:
        assert hub.repositories["user/int4"].files()[name] == (checkpoint / name).read_bytes()


def test_is_one_commit_and_nothing_when_nothing_has_changed(hub: HubServer, checkpoint: Path) -> None:
    first = push(checkpoint, "user/int4", commit_message="The first")
    assert push(checkpoint, "user/int4") == first
    assert hub.repositories["user/int4"].messages == ["initial commit", "The first"]
    assert len(transfers(hub)) == len(SHARDS)


def test_weights_of_an_earlier_version_go_with_the_commit(
    hub: HubServer, checkpoint: Path, made: Path, tmp_path: Path
) -> None:
    push(checkpoint, "user/int4")
    other = tmp_path / "other"
    quantize_checkpoint(made.parent / "src", other, HadaCoreConfig(group_size=32), progress=False)
    push(other, "user/int4")
    assert pushed_files(hub) == PUSHED - {*SHARDS, "model.safetensors.index.json"} | {"model.safetensors"}
    assert len(hub.repositories["user/int4"].messages) == 3
    assert torch.equal(logits_of("user/int4"), logits_of(other))
    # And back: a `model.safetensors` that stayed would be preferred to the shards.
    push(checkpoint, "user/int4")
    assert torch.equal(logits_of("user/int4"), logits_of(checkpoint))


@pytest.mark.parametrize(("option", "private"), [((), True), (("--private",), True), (("--public",), False)])
def test_a_new_repository_is_private_unless_told(
    hub: HubServer, checkpoint: Path, option: tuple[str, ...], private: bool
) -> None:
    assert run("push", checkpoint, "int4", *option).exit_code == 0
    assert hub.repositories["user/int4"].private is private
    assert run("push", checkpoint, "int4").exit_code == 0
    assert hub.repositories["user/int4"].private is private


def test_visibility_that_contradicts_is_an_error(hub: HubServer, checkpoint: Path) -> None:
    hub.add_repository("user/int4", private=False)
    result = run("push", checkpoint, "user/int4", "--private")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: user/int4: exists and is public; change that in its settings")
    assert pushed_files(hub) == set()


def test_revision(hub: HubServer, checkpoint: Path) -> None:
    assert run("push", checkpoint, "user/int4", "--revision", "v2/test").exit_code == 0
    assert pushed_files(hub) == set()
    assert pushed_files(hub, "v2/test") == PUSHED
    model = AutoModelForCausalLM.from_pretrained("user/int4", revision="v2/test")
    assert torch.equal(model(token_ids()).logits, logits_of(checkpoint))


def test_a_branch_beside_another_model(hub: HubServer, checkpoint: Path) -> None:
    others = ("adapter_model.safetensors", "onnx/model.onnx", "notes.txt")
    weights = ("model.safetensors", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json")
    hub.add_repository("user/int4", private=True, files=dict.fromkeys((*others, *weights), b"1"))
    assert run("push", checkpoint, "user/int4", "--revision", "int4").exit_code == 0
    assert pushed_files(hub) == {*others, *weights}
    assert pushed_files(hub, "int4") == PUSHED | {*others}


def test_pull_request(hub: HubServer, checkpoint: Path) -> None:
    hub.add_repository("org/model", private=False, files={"model.safetensors": b"big", "README.md": b"# Big"})
    result = run("push", checkpoint, "org/model", "--create-pr")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == f"{hub.url}/org/model/discussions/1"
    repository = hub.repositories["org/model"]
    assert set(repository.files()) == {".gitattributes", "model.safetensors", "README.md"}
    assert set(repository.files("refs/pr/1")) == PUSHED | {".gitattributes"}
    assert repository.files("refs/pr/1")["README.md"] == b"# Big"


@pytest.mark.parametrize("fault", [500, 503, 429, "drop"])
def test_an_interrupted_upload_is_retried(hub: HubServer, checkpoint: Path, fault: int | str) -> None:
    hub.fail("PUT", "/lfs/", fault, times=2)
    push(checkpoint, "user/int4")
    assert len(transfers(hub)) == len(SHARDS) + 2
    assert pushed_files(hub) == PUSHED
    assert torch.equal(logits_of("user/int4"), logits_of(checkpoint))


@pytest.mark.parametrize("fault", [500, "drop"])
def test_a_failed_upload_leaves_nothing_half_visible_and_goes_on(
    hub: HubServer, checkpoint: Path, fault: int | str
) -> None:
    third = hashlib.sha256((checkpoint / SHARDS[2]).read_bytes()).hexdigest()
    hub.faults.append(lambda method, path: fault if path == f"/lfs/{third}" else None)
    result = run("push", checkpoint, "user/int4")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: user/int4: the Hub ")
    assert pushed_files(hub) == set()
    hub.faults.clear()
    arrived = len(hub.objects)
    hub.requests.clear()
    assert run("push", checkpoint, "user/int4").exit_code == 0
    assert len(transfers(hub)) == len(SHARDS) - arrived
    assert pushed_files(hub) == PUSHED


def test_a_commit_that_fails_leaves_nothing_half_visible(hub: HubServer, checkpoint: Path) -> None:
    hub.fail("POST", "/commit/", 500, times=1)
    result = run("push", checkpoint, "user/int4")
    assert result.exit_code == 1
    assert "user/int4: the Hub answered 500 (fault of the test); nothing has changed" in result.stderr
    assert pushed_files(hub) == set()
    assert run("push", checkpoint, "user/int4").exit_code == 0
    assert pushed_files(hub) == PUSHED


def test_a_card_that_a_person_wrote_on_the_hub_is_kept(hub: HubServer, checkpoint: Path) -> None:
    hub.add_repository("user/int4", private=True, files={"README.md": b"# By hand\n"})
    push(checkpoint, "user/int4")
    assert hub.repositories["user/int4"].files()["README.md"] == b"# By hand\n"


def test_the_card_on_the_hub_follows_and_the_one_in_the_folder_wins(hub: HubServer, checkpoint: Path) -> None:
    push(checkpoint, "user/int4")
    report = checkpoint / "quantization_report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"source": "org/big"}))
    push(checkpoint, "user/int4")
    card = hub.repositories["user/int4"].files()["README.md"].decode()
    assert card == card_of(checkpoint, repo_id="user/int4")
    assert "org/big" in card and is_generated(card)
    assert not (checkpoint / "README.md").exists()
    write_card(checkpoint, license_id="mit")
    push(checkpoint, "user/int4")
    assert hub.repositories["user/int4"].files()["README.md"] == (checkpoint / "README.md").read_bytes()


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


def test_quantize_and_push(hub: HubServer, made: Path, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", 500, times=1)
    arguments = ("quantize", made.parent / "src", tmp_path / "new", "--device", "cpu", "--push", "user/int4")
    result = run(*arguments)
    assert result.exit_code == 1
    assert (
        f"{tmp_path / 'new'} is complete; hadacore push {tmp_path / 'new'} user/int4 sends it"
        in result.stderr
    )
    assert run("push", tmp_path / "new", "user/int4").exit_code == 0
    result = run(*(part if part != tmp_path / "new" else tmp_path / "newer" for part in arguments))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith(f"{hub.url}/user/int4/commit/")
    assert torch.equal(logits_of("user/int4"), logits_of(tmp_path / "newer"))


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
