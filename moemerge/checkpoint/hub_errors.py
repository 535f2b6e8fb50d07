"""What the hub client raises, in this package's errors. Knows nothing of what was asked for."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors

from moemerge.errors import (
    InvalidRecipe,
    MoemergeError,
    NetworkFailure,
    NotAuthorised,
    NotEnoughRoom,
    NotFound,
)

try:
    import httpx2 as httpx
except ImportError:  # hub clients before 2.0 are built on the original
    import httpx  # type: ignore[no-redef]

# Raised by the transfer library of newer clients only.
_XetError: type[Exception] = getattr(errors, "XetDownloadError", errors.HfHubHTTPError)


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Raise this package's errors for the hub client's, with `where` naming what was asked for."""
    try:
        yield
    except MoemergeError:
        raise
    except (
        OSError,
        httpx.HTTPError,
        errors.EntryNotFoundError,
        errors.HFValidationError,
        _XetError,
    ) as error:
        raise _translate(error, where) from error


def _translate(error: BaseException, where: str) -> MoemergeError:
    # A refused request for a file that is not cached arrives wrapped in "not cached".
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
        error.__cause__, errors.HfHubHTTPError
    ):
        return _translate(error.__cause__, where)
    if isinstance(error, errors.HfHubHTTPError):
        return _translate_answer(error, where)
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return NetworkFailure(f"{where}: offline, and not in the cache {constants.HF_HUB_CACHE}")
        return NetworkFailure(f"{where}: the hub did not answer, and the cache does not have it ({error})")
    if isinstance(error, errors.EntryNotFoundError):
        return NotFound(f"{where}: no such file in the repository")
    if isinstance(error, errors.HFValidationError):
        return InvalidRecipe(f"{where}: not a possible repository name. {error}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return NotEnoughRoom(f"{where}: the disk is full; finished files are kept")
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return NotAuthorised(
            f"{where}: cannot write {error.filename or constants.HF_HUB_CACHE} ({error.strerror}). "
            f"Set HF_HOME to a folder you may write to"
        )
    return NetworkFailure(
        f"{where}: the connection failed ({type(error).__name__}: {error}). "
        f"Finished files are kept; run again to continue"
    )


def _translate_answer(error: errors.HfHubHTTPError, where: str) -> MoemergeError:
    status = error.response.status_code if error.response is not None else 0
    if isinstance(error, errors.GatedRepoError):
        return NotAuthorised(f"{where}: gated. Request access on its page and log in with `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return NotFound(
            f"{where}: no such repository, or it is private and your token cannot see it. "
            f"Check the spelling, or log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFound(f"{where}: the repository has no such revision")
    if isinstance(error, errors.EntryNotFoundError):
        return NotFound(f"{where}: no such file in the repository")
    if isinstance(error, errors.DisabledRepoError):
        return NotAuthorised(f"{where}: the hub has disabled this repository")
    if status in (401, 403):
        return NotAuthorised(f"{where}: the hub refused access ({status}). Log in with `hf auth login`")
    return NetworkFailure(f"{where}: the hub answered {status or 'nothing'}. Try again later")
