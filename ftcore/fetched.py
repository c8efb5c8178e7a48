"""Images and recordings behind the links of rows, from hosts that the run's config allows and from no others."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import Any

from ftcore.errors import Exit, Problem, Refused
from ftcore.media import Reach

SECONDS = 30
"""How long a host may take to answer."""
LARGEST = 64 * 2**20
"""Bytes of the largest file that is taken."""


def fetch(link: str, reach: Reach) -> bytes:
    """The file behind a link.

    :raises Refused: where its host, or one that it sends on to, is not allowed, does not answer, or sends too much.
    """
    if not reach.answers(link):
        raise _refused(link, "its host is not among data.allow_hosts")
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Within(reach),
    ):
        opener.add_handler(handler)
    try:
        with opener.open(link, timeout=SECONDS) as answer:
            body: bytes = answer.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # urllib's errors are OSErrors; ValueError is a link that is none
        raise _refused(link, f"it cannot be fetched ({error})") from error
    if len(body) > LARGEST:
        raise _refused(link, f"it holds more than {LARGEST // 2**20} MiB")
    return body


class _Within(urllib.request.HTTPRedirectHandler):
    """Follows an answer that sends on to another address only where that one is allowed too."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not self._reach.answers(newurl):
            raise urllib.error.URLError(f"it sends on to {newurl[:80]}, whose host is not among data.allow_hosts")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _refused(link: str, why: str) -> Refused:
    message = f"the link {link[:80]} is not read: {why}"
    return Refused(Problem("data", message, "save the file and give its path", Exit.DATA))
