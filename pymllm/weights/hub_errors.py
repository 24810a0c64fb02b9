"""What the hub's client raises, as one short error of ours."""

from __future__ import annotations

from pymllm.disk import CODES, FIXES
from pymllm.disk import reason as why
from pymllm.errors import CheckpointError

LONGEST_REASON = 200  # characters of what the client says


def hub_failures() -> tuple[type[BaseException], ...]:
    """Return the errors that the hub's client raises for a model that it cannot give."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    # HfHubHTTPError's base is the HTTP library's own error, which e.g. a proxy's refusal is.
    return (OSError, EntryNotFoundError, HFValidationError, *HfHubHTTPError.__bases__)


def is_offline(error: BaseException) -> bool:
    """Tell whether the hub was not reached at all, so that what is in the cache may stand in for it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return True
    return not isinstance(error, (HfHubHTTPError, HFValidationError))


def refused(
    name: str, error: BaseException, *, revision: str | None = None, near: str = ""
) -> CheckpointError:
    """Make the error for a model that the hub did not give.  near: a sentence with names like the one asked for."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    where = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, errors.GatedRepoError):
        said, fix = (
            f"{name!r} is gated",
            f"Accept its terms at {where}, and log in (`hf auth login`, or HF_TOKEN).",
        )
    elif isinstance(error, errors.DisabledRepoError):
        said, fix = f"the hub has disabled {name!r}", "Choose another model."
    elif isinstance(error, errors.RevisionNotFoundError):
        said, fix = f"{name!r} has no revision {revision!r} on the hub", near or "Check --revision."
    elif isinstance(error, errors.RepositoryNotFoundError):
        said = f"{name!r} is not a local folder, and the hub has no such model, or not for you"
        fix = "Check the spelling; for a private model, log in (`hf auth login`, or HF_TOKEN)."
    elif status == 404:
        said, fix = f"the hub has no {name!r}", near or "Check the spelling."
    elif status in (401, 403):
        said, fix = (
            f"the hub does not let you read {name!r} (status {status})",
            "Check HF_TOKEN and its rights.",
        )
    elif status == 429:
        said, fix = "the hub refuses further requests for now (status 429)", "Wait, or log in (HF_TOKEN)."
    elif status is not None:
        said, fix = f"the hub did not give {name!r}: status {status}", "Try again later."
    elif isinstance(error, errors.HFValidationError):
        said, fix = f"{name!r} is neither a local folder nor a hub id", "Check the spelling."
    elif isinstance(error, OSError) and error.errno in CODES:
        said = f"the hub's cache cannot be written: {error.filename or constants.HF_HUB_CACHE}: {why(error)}"
        fix = f"{FIXES[CODES[error.errno]]} HF_HOME names another place."
    elif type(error) is OSError:  # of a file that came, but not whole
        said = f"the hub did not give {name!r} whole: {' '.join(str(error).split())[:LONGEST_REASON]}"
        fix = "Try again; if it stays, remove the model from the cache (`pymllm rm`)."
    elif constants.HF_HUB_OFFLINE:
        said = f"{name!r} is not in the hub's cache, and HF_HUB_OFFLINE is set"
        fix = f"Unset HF_HUB_OFFLINE, or download it first. The cache is {constants.HF_HUB_CACHE}."
    else:
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        said = f"{name!r} is not in the hub's cache, and the hub cannot be reached: {reason}"
        fix = f"Check the network and HF_ENDPOINT ({constants.ENDPOINT}); the cache is {constants.HF_HUB_CACHE}."
    return CheckpointError(said, code="model-not-found", fix=fix)
