"""Users of the listener: an htpasswd file with bcrypt hashes, as ``htpasswd -B`` writes it.

File format: Apache HTTP Server, ``htpasswd``; comments and empty lines as in distribution
``registry/auth/htpasswd/htpasswd.go``.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping

import bcrypt
from cachetools import TTLCache

from proxy.errors import CacheFailing, Unauthorized
from proxy.once import Once
from proxy.threads import Threads

_BCRYPT = re.compile(rb"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
_COSTS = range(4, 17)
_MAX_PASSWORD = 72
_AT_ONCE = 4
_WAITING = 64
_REMEMBERED = 300.0


class HtpasswdInvalid(Exception):
    """The file cannot be used; the text names the file and line, and nothing that is in it."""


def parse_htpasswd(text: bytes, source: str) -> dict[str, bytes]:
    """User -> bcrypt hash; ``source`` names the file. Raises ``HtpasswdInvalid``, for a file without users too."""
    users: dict[str, bytes] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split(b"\n"), start=1):
        line = line.strip()
        if not line or line.startswith(b"#"):
            continue
        where = f"{source}: line {number}"
        name, colon, hashed = line.partition(b":")
        if not colon or not name:
            raise HtpasswdInvalid(f"{where}: not 'user:hash'; write it with: htpasswd -B")
        found = _BCRYPT.fullmatch(hashed)
        if not found:
            raise HtpasswdInvalid(f"{where}: not a bcrypt hash, and no other kind is taken; write it with: htpasswd -B")
        if int(found[1]) not in _COSTS:
            raise HtpasswdInvalid(f"{where}: its cost is not within {_COSTS[0]} to {_COSTS[-1]}; write it with: htpasswd -B")
        try:
            user = name.decode()
        except UnicodeDecodeError:
            raise HtpasswdInvalid(f"{where}: the user's name is not UTF-8") from None
        if user in lines:
            raise HtpasswdInvalid(f"{where}: the same user as in line {lines[user]}; remove one")
        users[user], lines[user] = hashed, number
    if not users:
        raise HtpasswdInvalid(f"{source}: no user in it; add one with: htpasswd -B")
    return users


class Users:
    """Who may use the listener. A yes is remembered for 5 minutes, by a keyed hash that nobody outside can compute."""

    def __init__(self, users: Mapping[str, bytes], timer: Callable[[], float]) -> None:
        self._timer = timer
        self._key = secrets.token_bytes(32)
        self._threads = Threads(_AT_ONCE)
        self._begun = 0
        self.use(users)

    def use(self, users: Mapping[str, bytes]) -> None:
        """Only these from now on, and no yes from before is remembered."""
        self._users = dict(users)
        self._right: TTLCache[bytes, bool] = TTLCache(4096, _REMEMBERED, timer=self._timer)
        self._once: Once[bytes, bool] = Once()
        # What is checked for a user that does not exist takes as long as for one that does: as the dearest hash.
        cost = max((hashed[4:6] for hashed in users.values()), default=b"12")
        self._nobody = b"$2b$" + cost + b"$" + b"." * 53

    def knows(self, username: str, password: str) -> bool:
        """Whether a yes to these is remembered, so that ``verify`` has nothing to do."""
        return self._digest(username, password) in self._right

    async def verify(self, username: str, password: str) -> bool:
        """Whether this is a user and the password is right.

        Raises ``Unauthorized`` (without challenges) for a password over 72 bytes, of which bcrypt sees no more, and
        ``CacheFailing`` when too many checks are waiting.
        """
        given = _bytes_of(password)
        if len(given) > _MAX_PASSWORD:
            raise Unauthorized(
                f"the password is longer than {_MAX_PASSWORD} bytes, which bcrypt cannot check; use a shorter one"
            )
        digest = self._digest(username, password)
        right, once = self._right, self._once  # a yes by users that were exchanged meanwhile is not kept
        if digest in right:
            return True
        hashed = self._users.get(username)

        async def check() -> bool:
            matches = await self._compare(given, hashed or self._nobody)
            return matches and hashed is not None

        if not await once.run(digest, check):
            return False
        right[digest] = True
        return True

    def close(self) -> None:
        """Ends the threads; every check has returned."""
        self._threads.close()

    def _digest(self, username: str, password: str) -> bytes:
        user = _bytes_of(username)
        return hmac.digest(self._key, len(user).to_bytes(8) + user + _bytes_of(password), hashlib.sha256)

    async def _compare(self, password: bytes, hashed: bytes) -> bool:
        if self._begun >= _AT_ONCE + _WAITING:
            raise CacheFailing("too many passwords are being checked; try again in a second", headers={"Retry-After": "1"})
        self._begun += 1
        try:
            return await self._threads.run(bcrypt.checkpw, password, hashed)
        finally:
            self._begun -= 1


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
