"""Results on the Hugging Face hub: uploaded once they are saved here."""

from __future__ import annotations

import logging
import tempfile

import httpx2
import huggingface_hub

from mmpo_jax.core import progress
from mmpo_jax.core.buckets import copy_folder
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import is_local
from mmpo_jax.core.guard import HIDDEN
from mmpo_jax.core.processes import on_one
from mmpo_jax.recipes.hub import Hub

log = logging.getLogger(__name__)

UNREACHABLE = (
    huggingface_hub.errors.HfHubHTTPError,
    huggingface_hub.errors.OfflineModeIsEnabled,
    httpx2.HTTPError,
    OSError,
    ValueError,  # of a card that the hub does not take
)
"""What the hub or the way to it raises."""
REFUSED = (401, 403)
"""Statuses of a token that the hub does not take."""


def check_hub(hub: Hub | None) -> None:
    """Looks whether a result can be uploaded, before anything heavy starts.

    Args:
      hub: of the recipe; None where nothing is uploaded.

    Raises:
      MmpoError: there is no token, the hub does not take it, or `HF_HUB_OFFLINE` is set. A hub that
        cannot be reached may be reached later, and is warned of.
    """
    if hub is not None:
        on_one(lambda: _check(hub))


def _check(hub: Hub) -> None:
    token = huggingface_hub.get_token()
    if token is None:
        raise MmpoError(
            f"hub.repo {hub.repo}: there is no token: run `hf auth login`, or set HF_TOKEN"
        )
    if huggingface_hub.is_offline_mode():
        raise MmpoError(f"hub.repo {hub.repo}: HF_HUB_OFFLINE is set, so nothing can be uploaded")
    api = huggingface_hub.HfApi(token=token)
    try:
        api.whoami()
    except UNREACHABLE as error:
        told = _told(error, token)
        response = getattr(error, "response", None)
        if response is not None and response.status_code in REFUSED:
            raise MmpoError(
                f"hub.repo {hub.repo}: the hub does not take the token: {told}"
            ) from error
        log.warning(
            "hub.repo %s: %s is out of reach now, and is asked again at the end: %s",
            *(hub.repo, api.endpoint, told),
        )


def upload_result(folder: str, hub: Hub | None) -> str | None:
    """Uploads a saved model with its card; nothing else of a run.

    Args:
      folder: of the model, here or in a bucket.
      hub: of the recipe; None where nothing is uploaded.

    Returns:
      Where it is to be seen; None where nothing is uploaded.

    Raises:
      MmpoError: it did not get there. It says what to run; the result here is as it was.
    """
    return None if hub is None else on_one(lambda: _upload(folder, hub))


def _upload(folder: str, hub: Hub) -> str:
    if not is_local(folder):
        with tempfile.TemporaryDirectory(prefix="mmpo-") as here:
            copy_folder(folder, here)
            return _send(here, folder, hub)
    return _send(folder, folder, hub)


def _send(here: str, folder: str, hub: Hub) -> str:
    """Sends what lies `here`, which messages call `folder`."""
    token = huggingface_hub.get_token()
    api = huggingface_hub.HfApi(token=token)
    try:
        with progress.doing(f"uploading {folder} to {hub.repo}"):
            place = api.create_repo(hub.repo, private=hub.private, exist_ok=True)
            api.upload_folder(
                repo_id=hub.repo, folder_path=here, commit_message="Upload the result of mmpo"
            )
    except UNREACHABLE as error:
        private, told = " --private" if hub.private else "", _told(error, token)
        raise MmpoError(
            f"{folder} is saved, but it did not get to {api.endpoint}/{hub.repo}: {told}\n"
            f"run `hf upload {hub.repo} {folder} .{private}`, or the same command again"
        ) from error
    log.info("%s is uploaded to %s", folder, place)
    return str(place)


def _told(error: Exception, token: str | None) -> str:
    """One line of an error, without the token."""
    told = " ".join(str(error).split()) or type(error).__name__
    return told.replace(token, HIDDEN) if token else told
