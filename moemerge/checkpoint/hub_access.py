"""Whether the hub can be reached, and as whom."""

import time
from dataclasses import dataclass

from huggingface_hub import HfApi, constants, get_session, get_token

from moemerge.checkpoint.hub import endpoint
from moemerge.checkpoint.hub_errors import translated
from moemerge.errors import MoemergeError, NotAuthorised


@dataclass(frozen=True, slots=True, kw_only=True)
class HubAccess:
    """What the hub answered.

    Attributes:
        address: Of the hub.
        seconds: Until it answered; None where it did not, or was not asked.
        user: Whose token there is; None without a token, or with one that is not valid.
        problem: What is wrong, in words; empty when nothing is.
    """

    address: str
    seconds: float | None = None
    user: str | None = None
    problem: str = ""


def ask_hub() -> HubAccess:
    """Ask the hub for any answer, and for the name behind the token if there is one."""
    address = endpoint() or constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return HubAccess(address=address, problem="offline by HF_HUB_OFFLINE")
    begin = time.perf_counter()
    try:
        with translated(address):
            get_session().head(address, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            seconds = time.perf_counter() - begin
            if get_token() is None:
                return HubAccess(address=address, seconds=seconds)
            user = str(HfApi(endpoint=endpoint()).whoami()["name"])
    except NotAuthorised:
        return HubAccess(address=address, seconds=seconds, problem="the token is not valid")
    except MoemergeError as error:
        # Its words are those of a download; here only the cause counts.
        return HubAccess(address=address, problem=f"the connection failed: {error.__cause__}")
    return HubAccess(address=address, seconds=seconds, user=user)
