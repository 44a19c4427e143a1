"""Uploading an exported folder to the Hugging Face hub. Nothing here asks the network before it is told to upload."""

from __future__ import annotations

from pathlib import Path

from ..errors import RunFailed, UserError
from ..models.hub import is_hub_id


def check_target(name: str) -> None:
    """UserError when `name` is no OWNER/NAME, or no token of the hub is here."""
    from huggingface_hub import get_token

    if not is_hub_id(name):
        raise UserError(f"--push {name}: write OWNER/NAME, e.g. --push me/my-student")
    if get_token() is None:
        raise UserError("--push needs a Hugging Face token: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, private: bool = False) -> str:
    """Uploads `folder` to the model repository `name` (OWNER/NAME), which is made if need be, and answers its address.

    private: of a new repository; UserError when there is a public one already. UserError when the hub refuses or
    cannot be reached; RunFailed when it stops halfway.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(name, private=private or None, exist_ok=True))
        public = private and not api.repo_info(name).private
    except Exception as error:  # of the HTTP client, which differs between versions of huggingface_hub
        raise UserError(f"cannot upload to {name}: {_reason(error)}; '{folder}' stays as it is") from error
    if public:
        raise UserError(f"{name} is there already and is public: make it private on the hub, or leave --private out")
    try:
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by fewstep")
    except Exception as error:
        raise RunFailed(f"upload to {name} failed: {_reason(error)}; '{folder}' is whole, push it again") from error
    return address


def _reason(error: Exception) -> str:
    """One line, with the mend where it is known."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    mend = {401: "the token is not valid: run `hf auth login`", 403: "the token may not write there"}
    if status in mend:
        return mend[status]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
