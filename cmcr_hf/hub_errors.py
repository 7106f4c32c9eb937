"""What the Hub refuses, as one line that says what to do."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)


def explanation(error: BaseException, repo_id: str) -> str:
    """Say in one line what the Hub, or the way there, has against a request, and what to do."""
    if isinstance(error, OfflineModeIsEnabled):
        return "The Hub is not asked, since HF_HUB_OFFLINE is set. Unset it to push."
    if isinstance(error, LocalTokenNotFoundError):
        return "You are not logged in. Run `hf auth login`, or set HF_TOKEN."
    if not isinstance(error, HfHubHTTPError):
        return (
            f"The connection to {constants.ENDPOINT} broke ({type(error).__name__}: {error}). What was uploaded is "
            "not sent twice."
        )
    status, said = error.response.status_code, error.server_message or "no reason given"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated, and not for you. Ask for access at {constants.ENDPOINT}/{repo_id}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such branch. Name one of those on its page."
    if status == 401:
        return "The Hub takes you for nobody, or your token for none (401). Run `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return (
            f"Your token may not write to {repo_id} (403: {said}). Make one that may at {constants.ENDPOINT}/settings/"
            "tokens and run `hf auth login`, or push to a name of your own."
        )
    if status == 404:
        return f"There is no {repo_id} that your token may see (404). Check the name, or run `hf auth login`."
    if status in (409, 412):
        return f"{repo_id} changed while it was pushed to ({status}). Look at its latest commit."
    if status == 429:
        return "The Hub has had too many requests of yours (429). Wait some minutes."
    if status >= 500:
        return f"The Hub is in trouble ({status}). https://status.huggingface.co tells more."
    return f"The Hub refuses the push to {repo_id} ({status}): {said.rstrip('.')}."
