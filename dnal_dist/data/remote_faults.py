"""What an exception of fsspec, or of the libraries below it, says of a remote file: in our words, never in theirs."""

import os
import re
from http import HTTPStatus
from typing import NamedTuple

from dnal_dist.common.errors import CREDENTIALS
from dnal_dist.data.http import Refused

_TRANSIENT_CODES = {"SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "Throttling", "ThrottlingException"}
# By name, since the libraries that define them (aiohttp, botocore, fsspec) may be absent.
_CUT = {"ClientPayloadError", "IncompleteReadError", "ResponseStreamingError", "ConnectionResetError", "ServerDisconnectedError"}
_CUT |= {"TimeoutError", "FSTimeoutError", "EOFError"}
_TRANSIENT = _CUT | {"ClientConnectionError", "HTTPClientError", "ConnectionError"}
_UNREACHED = {
    "ClientConnectorError",
    "ConnectTimeoutError",
    "ServerTimeoutError",
    "EndpointConnectionError",
    "ProxyConnectionError",
}
_TEXTS = {"TimeoutError": "too slow", "EOFError": "the body ends too soon", "gaierror": "no such host is known"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "PermissionError", "GoogleAuthError", "RefreshError"}
_PERMANENT = {
    "HTTP 404 Not Found": {"FileNotFoundError"},
    f"no credentials, or none that are accepted; {CREDENTIALS}": _NO_CREDENTIALS,
    "the server's certificate does not verify": {"ClientConnectorCertificateError", "SSLCertVerificationError"},
}


class RemoteFault(NamedTuple):
    text: str
    transient: bool = False
    cut: bool = False
    unreached: bool = False
    """No connection was made."""


def classify(error: BaseException) -> RemoteFault:
    """The fault behind an exception of fsspec or of the libraries below it."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    if isinstance(chain[0], Refused):
        return RemoteFault(str(chain[0]))
    if answers := [found for one in chain if (found := _answer(one))]:
        status, code = answers[-1]
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
        text = " ".join(filter(None, (f"HTTP {status}", phrase, code)))
        transient = status in (408, 425, 429) or (status >= 500 and status not in (501, 505)) or code in _TRANSIENT_CODES
        return RemoteFault(text + (f"; {CREDENTIALS}" if status in (401, 403) else ""), transient)
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    if permanent := next((text for text, kinds in _PERMANENT.items() if names & kinds), None):
        return RemoteFault(permanent)
    number = next((one.errno for one in reversed(chain) if isinstance(one, OSError) and isinstance(one.errno, int)), None)
    text = type(chain[-1]).__name__ + (f": {os.strerror(number)}" if number else "")
    text = next((text for name, text in _TEXTS.items() if name in names), text)
    return RemoteFault(text, bool(names & _TRANSIENT), bool(names & _CUT), bool(names & _UNREACHED))


def _answer(error: BaseException) -> tuple[int, str] | None:
    """Status and error code of the server's answer behind an exception of botocore, aiohttp or gcsfs; None for other exceptions."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status, code = response.get("ResponseMetadata", {}).get("HTTPStatusCode"), str(response.get("Error", {}).get("Code", ""))
    else:
        names, code = {kind.__name__ for kind in type(error).__mro__}, ""
        # Other exceptions of these libraries have a status that no server sent.
        status = error.status if "ClientResponseError" in names else error.code if "HttpError" in names else None
    return (status, code if re.fullmatch(r"[A-Za-z]{1,60}", code) else "") if isinstance(status, int) else None
