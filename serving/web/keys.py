"""API keys: who may ask. A key is never kept or compared itself, but its SHA-256, which is as long for every key."""

import hashlib
import hmac
import ipaddress
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from bayes_dispatch.errors import ConfigError

__all__ = ["VARIABLE", "Keys", "is_loopback"]

VARIABLE = "BAYES_DISPATCH_KEYS"
SHORTEST = 16  # characters of a key: a shorter one can be guessed


class Keys:
    """Keys by the names of those who have them.

    Args:
        keys: pairs of name and key.

    Raises:
        ConfigError: none, a name or a key twice, a name that is no word, or a key of fewer than 16 characters.
    """

    def __init__(self, keys: Iterable[tuple[str, str]]) -> None:
        self._digests: dict[str, bytes] = {}
        for name, key in keys:
            if not name.isprintable() or not name or " " in name:
                raise ConfigError(f"expected a name of an API key without spaces, got {name!r:.40}")
            if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"expected an API key of {SHORTEST} or more letters and digits for {name}, got another"
                )
            digest = _digest(key.encode())
            if name in self._digests or digest in self._digests.values():
                raise ConfigError(f"expected distinct names and API keys, got {name} or its key twice")
            self._digests[name] = digest
        if not self._digests:
            raise ConfigError("expected at least one API key, got none")

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """From lines of a name and a key; empty ones and those that begin with # are skipped.

        Raises:
            ConfigError: it cannot be read, others than its owner may read the file or write to it, or see the class.
        """
        try:
            with path.open(encoding="utf-8") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                    raise ConfigError(f"expected a file of keys that its owner alone may read, got {path}: chmod 600")
                lines = [line.split() for line in file if line.strip() and not line.startswith("#")]
        except UnicodeDecodeError:
            raise ConfigError(f"expected a file of keys in UTF-8, got {path}") from None
        except OSError as error:
            raise ConfigError(f"expected a readable file of keys {path}, got: {error.strerror or error}") from None
        if any(len(line) != 2 for line in lines):
            raise ConfigError(f"expected lines of a name and a key in {path}, got others")
        return cls((name, key) for name, key in lines)

    @classmethod
    def given(cls, path: Path | None, environment: Mapping[str, str]) -> "Keys | None":
        """From a file, or else from ``BAYES_DISPATCH_KEYS``, which is ``name:key,name:key``; ``None`` for neither.

        Raises:
            ConfigError: as :meth:`read`, or a variable that is written otherwise.
        """
        if path is not None:
            return cls.read(path)
        if VARIABLE not in environment:
            return None
        pairs = [pair.partition(":") for pair in environment[VARIABLE].split(",")]
        if not all(colon for _, colon, _ in pairs):
            raise ConfigError(f"expected name:key,name:key in {VARIABLE}, got something else")
        return cls((name.strip(), key.strip()) for name, _, key in pairs)

    def owner(self, key: bytes) -> str | None:
        """Whose key it is. All are compared, each in constant time."""
        digest, found = _digest(key), None
        for name, own in self._digests.items():
            if hmac.compare_digest(own, digest):
                found = name
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own, and reaches no other."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
