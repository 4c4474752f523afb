"""A model that the user named by its id on the Hugging Face hub, as a folder of this machine."""

from __future__ import annotations

from pathlib import Path

from agentctx.memory.errors import ModelError
from agentctx.models.fetch import Progress

_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # neither pickles nor code


def snapshot(name: str, *, offline: bool, progress: Progress) -> Path:
    """The folder of the hub model `name`: the cached one, else downloaded unless `offline`.

    ModelError `not_fetched` if it is not cached and may not, or cannot, be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED), local_files_only=True))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder nor a hub id: {error}", code="not_fetched") from error
    except LocalEntryNotFoundError as error:
        if offline:
            raise ModelError(
                f"the hub model {name} is not on this machine, and this run is offline", code="not_fetched"
            ) from error
    progress(f"fetching {name} from the hub", 0, None)
    disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except (
        HfHubHTTPError,
        OSError,
    ) as error:  # LocalEntryNotFoundError, which also means no connection, is an OSError
        raise ModelError(
            f"the hub model {name} could not be fetched: {str(error).strip().partition(chr(10))[0]}",
            code="not_fetched",
            hint="check the name and the connection, or give a folder",
        ) from error
    finally:
        enable_progress_bars()
