"""Push a model to the Hub in one commit, the last request of a push: one that breaks leaves the repository as it was.

`HfApi.upload_folder` is not used: with Xet it commits a large folder part by part.
"""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from ..hub_errors import explanation
from ..output import CARD
from .folder import check_folder, check_sources, folder_files
from .hub import EVAL_RESULTS, is_local, model_card, public_name, quoted

if TYPE_CHECKING:
    from ..modeling.modeling_cmcr import CMCRPreTrainedModel
    from ..modeling.processing_cmcr import CMCRProcessor

# Heading of what transformers writes where there is no card, as with the push of a processor.
EMPTY_CARD = "# Model Card for Model ID"
# What transformers names weights: whole, or in shards with their index.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def push_folder(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    message: str | None = None,
) -> CommitInfo:
    """Make a repository of the Hub hold a model folder and nothing else, in one commit, and return that.

    The folder is checked first (see [`check_folder`]). A repository that is missing is created, and a branch; files of
    former pushes that the folder lacks are deleted in the same commit, except results that others added. A card whose
    heading is the name of a folder names the repository there, and of sources that were folders the configuration
    keeps the names alone. Where all is up to date, the latest commit is returned.

    Args:
        private: create the repository private; a public one of that name is refused. Its owner's default where `None`.
        revision: branch to push to, made from the main one where it is missing.
        token: of an account with write access, that of `hf auth login` where it is `None`.
        message: of the commit.

    Raises:
        ValueError: the folder is not complete, or the repository is public and was to be private.
        OSError: the Hub cannot be reached or refuses; says why and what to do.
    """
    folder = Path(folder)
    check_folder(folder)
    options = [*(["--private"] if private else []), *([] if revision is None else ["--revision", revision])]
    again = f"`{shlex.join(['cmcr', 'push', str(folder), repo_id, *options])}`"
    target = open_target(repo_id, private=private, revision=revision, token=token, again=again)
    content = _content(folder)
    content[CARD] = _with_name((folder / CARD).read_text(encoding="utf-8"), target.repo_id).encode()
    return target.commit(content, message or f"Push {folder.resolve().name}", _is_ours)


def check_target(repo_id: str, token: bool | str | None = None) -> None:
    """Check what can be known of a push before the work that makes the folder: name, token, and that the Hub answers.

    Raises:
        ValueError: the name is none of the Hub's.
        OSError: there is no token, the Hub does not take it, or it cannot be reached; says why and what to do.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"Expected a repository as ORG/NAME, got {repo_id!r}: {error}") from error
    with _explained(repo_id):
        user = HfApi(token=token).whoami()
    if user["auth"]["accessToken"]["role"] == "read":
        raise OSError(
            f"Your token may read alone. Make one that may write at {constants.ENDPOINT}/settings/tokens and run "
            "`hf auth login`."
        )


def push_model(
    model: CMCRPreTrainedModel,
    repo_id: str,
    *,
    processor: CMCRProcessor | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Push a model with its code, its processor and a card in one commit (see `CMCRModel.push_to_hub`)."""
    tags = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        check_sources(json.loads((folder / "config.json").read_text(encoding="utf-8")), type(model).__name__)
        target = open_target(repo_id, private=private, revision=revision, token=token, create_pr=create_pr)
        content = _content(folder)
        found = target.read(CARD) if CARD in target.files else EMPTY_CARD
        # Another one, of a push of a folder or written by hand, knows more than the configuration.
        card: Any = (
            model_card(model.config, repo_id=target.repo_id, licences={}) if EMPTY_CARD in found else ModelCard(found)
        )
        missing = [tag for tag in dict.fromkeys(tags) if tag not in (card.data.tags or [])]
        if missing:
            card.data.tags = [*(card.data.tags or []), *missing]
        if missing or EMPTY_CARD in found:
            content[CARD] = str(card).encode()
        return target.commit(
            content, commit_message or "Upload model", lambda name: bool(WEIGHTS.fullmatch(name)), commit_description
        )


def _content(folder: Path) -> dict[str, Path | bytes]:
    """Return what of a folder is pushed: all, but of the paths of sources in the configuration the last part alone."""
    content: dict[str, Path | bytes] = dict(folder_files(folder))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = [(record, "id") for record in (config.get("sources") or {}).values()]
    named += [(part, "_name_or_path") for name, part in config.items() if name.endswith("_config")]
    paths = [(part, key) for part, key in named if isinstance(part, dict) and part.get(key) and is_local(part[key])]
    for part, key in paths:
        part[key] = public_name(part[key])
    if paths:
        content["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return content


def _with_name(card: str, repo_id: str) -> str:
    """Return a card that was made for a folder, by the name in its heading, for a repository."""
    heading = re.search(r"^# ([^/\n]+)$", card, re.MULTILINE)
    # Of a card by hand, the heading is no name that the code in it loads.
    if heading is None or not any(f"{before}{quoted(heading[1])}" in card for before in "(="):
        return card
    return card.replace(f"\n# {heading[1]}\n", f"\n# {repo_id}\n").replace(quoted(heading[1]), quoted(repo_id))


def _is_ours(name: str) -> bool:
    """Return whether a push of a folder may delete a file: not what the Hub needs, nor results that others added."""
    return name != ".gitattributes" and (name == EVAL_RESULTS or not fnmatch(name, ".eval_results/*"))


@dataclass(frozen=True)
class Target:
    """A branch of a repository, as it was when the push began.

    Args:
        repo_type: `model` or `dataset`.
    """

    api: HfApi
    repo_id: str
    repo_type: str
    revision: str | None
    head: str
    files: list[str]
    create_pr: bool
    again: str

    @property
    def page(self) -> str:
        """The repository as its page on the Hub names it."""
        return _page(self.repo_id, self.repo_type)

    def read(self, name: str) -> str:
        with _explained(self.page, self.again), tempfile.TemporaryDirectory() as folder:
            path = self.api.hf_hub_download(
                self.repo_id, name, repo_type=self.repo_type, revision=self.head, local_dir=folder
            )
            return Path(path).read_text(encoding="utf-8")

    def commit(
        self,
        content: Mapping[str, Path | bytes],
        message: str,
        is_stale: Callable[[str], bool],
        description: str | None = None,
    ) -> CommitInfo:
        """Commit files, and delete those of the others that are stale."""
        stale = [name for name in self.files if name not in content and is_stale(name)]
        with _explained(self.page, self.again):
            return self.api.create_commit(
                self.repo_id,
                [
                    *(CommitOperationDelete(path_in_repo=name) for name in stale),
                    *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=part) for name, part in content.items()),
                ],
                commit_message=message,
                commit_description=description,
                repo_type=self.repo_type,
                revision=self.revision,
                create_pr=self.create_pr,
                # What was pushed by others in the meantime is not deleted unseen.
                parent_commit=self.head,
            )


def open_target(
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    token: bool | str | None,
    create_pr: bool = False,
    again: str = "the same again",
    repo_type: str = "model",
) -> Target:
    """Create a repository and a branch where they are missing, and look at what they hold."""
    api = HfApi(token=token)
    page = _page(repo_id, repo_type)
    with _explained(page, again):
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        info = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        if private and not info.private:
            raise ValueError(
                f"{page} exists and is public, so nothing was pushed to it. Make it private in its settings, or "
                "push to another name."
            )
        files = api.list_repo_files(repo_id, repo_type=repo_type, revision=info.sha)
    return Target(api, repo_id, repo_type, revision, str(info.sha), files, create_pr, again)


def _page(repo_id: str, repo_type: str) -> str:
    return f"{constants.REPO_TYPES_URL_PREFIXES.get(repo_type, '')}{repo_id}"


@contextmanager
def _explained(repo_id: str, again: str | None = None) -> Iterator[None]:
    """Turn what the client raises of the Hub and of the connection into one line that says what to do.

    Args:
        again: what to run to go on.
    """
    rest = "" if again is None else f" To go on, run {again}."
    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, RuntimeError) as error:
        # That of one file, and of a token, is the cause of the client's own error.
        wrapped = isinstance(error.__cause__, HfHubHTTPError) or type(error) is RuntimeError
        cause = error.__cause__ if wrapped and error.__cause__ is not None else error
        raise OSError(explanation(cause, repo_id) + rest) from error
    except json.JSONDecodeError as error:
        raise OSError(f"The Hub answers what is no JSON ({error}). Try again later.{rest}") from error
