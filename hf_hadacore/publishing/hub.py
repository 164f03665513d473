"""Publishing a checkpoint on the Hub: what is sent, in a single commit, and what is said if it cannot be."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .. import compat
from ..architecture import find_model_class, load_model_config, read_config_file, read_recipe
from ..config import QUANT_METHOD
from ..errors import CheckpointError, HadaCoreError, HubError
from ..evaluation.report import read_evaluation
from ..integrity import INDEX_NAME, PICKLE_SUFFIXES, WEIGHTS_NAME, checkpoint_files
from ..offline.staging import REPORT_NAME, small_files
from ..quantizer import HadaCoreHfQuantizer
from .model_card import CARD_NAME, EVALUATION_PATTERN, card_of, is_generated

DEFAULT_MESSAGE = "Upload int4 checkpoint"

_WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx", *PICKLE_SUFFIXES)
# What `from_pretrained` looks for; adapters and other files beside it are not ours to remove.
_LOADED = re.compile(r"(pytorch_)?model[^/]*\.(safetensors|bin|index\.json)")
_TOKEN = re.compile(r"[!-~]+")


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = DEFAULT_MESSAGE,
) -> str:
    """Upload an int4 checkpoint to the Hub, in a single commit: it is there as a whole or not at all.

    Weights go first, and what has arrived is not sent again, so the same call continues an upload that was
    interrupted. Weights of an earlier version that are no longer part of the checkpoint are removed by the
    same commit. A folder without a model card gets one if it has a quantization report, unless a person has
    written one in the repository.

    Args:
        folder: the checkpoint; see `files_to_push` for what is sent.
        repo_id: "owner/name", or "name" in the token's own namespace. Made if it does not exist.
        private: of a repository that is made; None is private, since what was public for a moment cannot be
            taken back. An existing one keeps its visibility, and one that contradicts is an error.
        revision: branch to commit to, made from main if it does not exist; None is main.
        create_pr: open a pull request instead, against main of an existing repository.
        token: of the Hub; None takes the one of `hf auth login` or HF_TOKEN.
        commit_message: first line of the commit.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        CheckpointError: the folder is no whole int4 checkpoint.
        EvaluationError: an evaluation in the folder is of other weights.
        HubError: there is no token, or it has no permission; the repository holds another model, or has
            another visibility; the Hub cannot be reached.
    """
    folder = Path(folder)
    files = files_to_push(folder)
    if create_pr and revision is not None:
        raise HubError("a pull request gets a revision of its own: create_pr and revision exclude each other")
    api = HfApi(token=require_token(token))
    with _explained(repo_id):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        state = _open_repository(api, repo_id, private, revision, may_create=not create_pr)
        if not create_pr and revision in (None, DEFAULT_REVISION):
            _check_is_no_other_model(api, state)
        additions = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
        if card := _missing_card(api, state, folder):
            additions.append(CommitOperationAdd(CARD_NAME, card.encode()))
        sent = {addition.path_in_repo for addition in additions}
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name) for name in _names(state) if _is_stale(name, sent))],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=state.sha,
        )
    return commit.pr_url or commit.commit_url


def files_to_push(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of an int4 checkpoint that loading and judging it need; everything is checked on the way.

    That is weights and their index, config.json, tokenizer, processor and generation files, chat templates,
    licenses, the quantization report, evaluations (`evaluation*.json`) and the model card. No pickles, no
    code, no journals, no hidden files and no other folders.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: it is no whole int4 checkpoint.
        EvaluationError: an evaluation is of other weights.
    """
    folder = Path(folder)
    weights = _check_checkpoint(folder)
    for file in sorted(folder.glob(EVALUATION_PATTERN)):
        read_evaluation(file, folder)
    index = [] if weights[0].name == WEIGHTS_NAME else [folder / INDEX_NAME]
    described = [file for name in (REPORT_NAME, CARD_NAME) if (file := folder / name).is_file()]
    return [*weights, *index, folder / "config.json", *described, *small_files(folder)]


def require_token(token: str | None = None) -> str:
    """The token to use, without asking the Hub what it is worth.

    Args:
        token: None takes the one of `hf auth login` or HF_TOKEN.

    Raises:
        HubError: there is none, or it cannot be one.
    """
    token = token or get_token()
    if token is None:
        raise HubError("there is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")
    if not _TOKEN.fullmatch(token):
        # The transport would quote it in its own error.
        raise HubError("the token for the Hub holds blanks or other characters that no token has")
    return token


def _check_checkpoint(folder: Path) -> list[Path]:
    """The weight files, after the checks that loading them would make."""
    read_config_file(folder)
    files = checkpoint_files(folder)
    recipe = read_recipe(folder)
    config = load_model_config(folder, quantized=True)
    model_class = find_model_class(config, folder)
    try:
        compat.meta_model(model_class, config, HadaCoreHfQuantizer(recipe, pre_quantized=True), None, files)
    except HadaCoreError:
        raise
    except Exception as error:  # damaged values fail in as many ways as there are models
        raise CheckpointError(f"{folder}: no model can be built from its config.json: {error}") from error
    return files


def _open_repository(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, *, may_create: bool
) -> ModelInfo:
    """The state of a repository's revision; both are made if they do not exist."""
    try:
        state = api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if not may_create or error.response.status_code != 404:
            raise
        api.create_repo(repo_id, private=private is not False)
        state = api.model_info(repo_id)
    else:
        if private is not None and state.private != private:
            raise HubError(
                f"{repo_id}: exists and is {'private' if state.private else 'public'}; change that in its "
                "settings on the Hub, or leave the option out to keep it"
            )
    if revision is None:
        return state
    if not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision)


def _check_is_no_other_model(api: HfApi, state: ModelInfo) -> None:
    weights = [name for name in _names(state) if name.endswith(_WEIGHT_SUFFIXES)]
    if not weights:
        return
    recipe = None
    if "config.json" in _names(state):
        folder = Path(api.hf_hub_download(state.id, "config.json", revision=state.sha)).parent
        recipe = read_config_file(folder).get("quantization_config")
    if not isinstance(recipe, dict) or recipe.get("quant_method") != QUANT_METHOD:
        raise HubError(
            f"{state.id}: the name is taken by another model ({weights[0]}), which is not replaced; choose "
            "another name, a revision (--revision) or a pull request (--create-pr)"
        )


def _missing_card(api: HfApi, state: ModelInfo, folder: Path) -> str | None:
    """A card, if neither the folder has one nor the repository one that a person wrote."""
    if (folder / CARD_NAME).exists() or not (folder / REPORT_NAME).exists():
        return None
    if CARD_NAME in _names(state):
        present = Path(api.hf_hub_download(state.id, CARD_NAME, revision=state.sha))
        if not is_generated(present.read_text("utf-8")):
            return None
    return card_of(folder, repo_id=state.id)


def _is_stale(name: str, sent: set[str]) -> bool:
    """Whether a file of the repository belongs to earlier weights: `from_pretrained` might prefer them."""
    if name in sent or "/" in name:
        return False
    is_result = name == REPORT_NAME or Path(name).match(EVALUATION_PATTERN)
    return is_result or _LOADED.fullmatch(name) is not None


def _names(state: ModelInfo) -> list[str]:
    return [file.rfilename for file in state.siblings or ()]


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn what the client raises into a line that says what to do."""
    try:
        yield
    except HadaCoreError:
        raise
    except Exception as error:  # its own errors, those of two transports, and bare ones around either
        raise HubError(f"{repo_id}: {_explanation(error)}") from error


def _explanation(error: Exception) -> str:
    if isinstance(error, HFValidationError):
        return f"is no name of a repository, owner/name: {_line(error)}"
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off; unset HF_HUB_OFFLINE"
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
        return _line(error)
    causes = list(_causes(error))
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answer is not None:
        return _explanation_of_answer(answer)
    return (
        "the Hub cannot be reached, and nothing has changed there; the same again goes on: "
        f"{_line(causes[-1])}"
    )


def _explanation_of_answer(answer: HfHubHTTPError) -> str:
    status = answer.response.status_code
    if status == 401:
        return "the Hub does not accept the token; log in again with `hf auth login`"
    if status == 403:
        return (
            "the token has no permission to write; it needs the role 'write' and an owner who is you or your "
            "organization (or propose a change with --create-pr)"
        )
    if isinstance(answer, RepositoryNotFoundError):
        return "there is no such repository, or the token may not see it"
    if isinstance(answer, RevisionNotFoundError):
        return "there is no such revision"
    if status == 409:
        return "the name is taken; choose another one"
    if status == 412:
        return "the repository has changed during the upload; look at it and push again"
    said = " ".join((answer.server_message or "no reason given").split())
    return f"the Hub answered {status} ({said}); nothing has changed, try again later"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it, the first cause last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
