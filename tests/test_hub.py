"""Pushing over real HTTP, with the real client, to a Hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_cases import SHARDS, pushed_files, run, transfers
from hub_server import TOKEN, HubServer
from tiny_models import make_model, token_ids
from transformers import AutoModelForCausalLM

from hf_hadacore import HadaCoreConfig
from hf_hadacore.offline.checkpoint import quantize_checkpoint
from hf_hadacore.publishing.hub import push
from hf_hadacore.publishing.model_card import card_of, is_generated, write_card

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
