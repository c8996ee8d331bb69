"""Who may ask: tenants and the digests of their API keys, from a file that may change."""

import hashlib
import logging
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import ConfigDict, Field, StringConstraints, ValidationError, model_validator

from phi4ray.config import YAML_ERRORS, Config
from phi4ray.errors import ConfigError

logger = logging.getLogger(__name__)

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Tenant(Config):
    """One customer of the service. Limits hold for all its keys together, over the fleet."""

    name: str = Field(min_length=1)
    key_sha256: tuple[Digest, ...] = Field(
        min_length=1, description="Digests of its keys; two while one replaces the other"
    )
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0, description="Prompt and answer together")
    max_concurrency: int | None = Field(None, ge=1, description="Requests at once")
    priority: int = Field(0, description="Lower goes first where requests wait, as in vLLM")
    models: tuple[str, ...] | None = Field(None, description="Models it may name; None: all")
    disabled: bool = False


class Tenants(Config):
    """The contents of a keys file."""

    # A key that was put where its digest belongs must not come back in a traceback.
    model_config = ConfigDict(hide_input_in_errors=True)

    tenants: tuple[Tenant, ...]

    @model_validator(mode="after")
    def _check(self) -> "Tenants":
        names = [tenant.name for tenant in self.tenants]
        digests = [digest for tenant in self.tenants for digest in tenant.key_sha256]
        for kind, found in (("tenant", names), ("key", digests)):
            if twice := {one for one in found if found.count(one) > 1}:
                raise ValueError(f"{kind} {min(twice)} is there twice")
        return self


def parse(text: str, source: str) -> Tenants:
    """Read a keys file, YAML or JSON.

    Raises:
        ConfigError: names the file and every field that is wrong.
    """
    try:
        return Tenants.model_validate(yaml.safe_load(text))
    except yaml.MarkedYAMLError as error:
        # Without the line itself, and without the cause that quotes it: it may hold a key.
        mark = error.problem_mark
        at = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source} is not valid YAML: {error.problem}{at}") from None
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{source} is no keys file:\n" + "\n".join(lines)) from error
    except RecursionError:
        raise ConfigError(f"{source} is not valid YAML: it is nested too deeply") from None
    except YAML_ERRORS as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error


def digest(key: str) -> str:
    """What a keys file holds of a key. Keys are long and random: one round of SHA-256 does."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> tuple[str, str]:
    """A new key, to be handed to its owner, and its digest, for the keys file."""
    key = f"sk-phi4-{secrets.token_urlsafe(32)}"
    return key, digest(key)


class KeyRing:
    """The tenants by their keys; reads the file again when it has changed."""

    def __init__(self, path: Path, reload_interval_s: float) -> None:
        """Read the file for the first time.

        Raises:
            ConfigError: it cannot be read.
        """
        self._path, self._interval_s = path, reload_interval_s
        self._seen = self._read()
        self.tenants = parse(self._seen, str(path)).tenants
        """All of them; another tuple once the file was read again."""
        self._by_digest = _by_digest(self.tenants)
        self._unreadable: str | None = None
        self._next_look_s = 0.0

    def find(self, key: str, now_s: float) -> Tenant | None:
        """The owner of a key. Looked up by digest: timing tells nothing about other keys."""
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + self._interval_s
            self._reload()
        return self._by_digest.get(digest(key))

    def _read(self) -> str:
        try:
            return self._path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"keys_file {self._path} cannot be read: {error}") from error

    def _reload(self) -> None:
        # Kubernetes swaps a secret's files by a link: their contents tell, not their times.
        try:
            text = self._read()
        except ConfigError as error:
            if str(error) != self._unreadable:
                self._unreadable = str(error)
                logger.error("the old API keys stay valid: %s", error)
            return
        self._unreadable = None
        if text == self._seen:
            return
        self._seen = text
        try:
            self.tenants = parse(text, str(self._path)).tenants
        except ConfigError as error:
            logger.error("the old API keys stay valid: %s", error)
            return
        self._by_digest = _by_digest(self.tenants)
        logger.info("read API keys of %d tenants again", len(self.tenants))


def _by_digest(tenants: Iterable[Tenant]) -> Mapping[str, Tenant]:
    return {one: tenant for tenant in tenants for one in tenant.key_sha256}
