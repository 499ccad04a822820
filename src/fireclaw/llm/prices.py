"""What a call costs: an override file first, nothing for models on machines of one's own, else public list prices.

The list is the ``genai-prices`` package, used without a network; its version goes with every price. The override file,
``prices.toml`` beside ``fireclaw.toml``, has a section for each model, in US dollars for a million tokens::

    ["anthropic:claude-sonnet-4-5"]
    input = 3.0
    cached = 0.3          # optional: read from a cache; the price of input otherwise
    written = 3.75        # optional: written to a cache; the price of input otherwise
    output = 15.0
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import importlib
import ipaddress
import tomllib
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import urlsplit

from fireclaw.errors import ConfigError
from fireclaw.llm.names import ProviderKind, is_cloud, parse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fireclaw.llm.chat import Usage

_LOCAL: Final = "local"
_UNKNOWN: Final = "unknown"
_NANO_PER_MILLIONTH: Final = 1000  # dollars for a million tokens are thousands of nanodollars for one


@dataclass(frozen=True)
class Price:
    """The price of a call.

    Attributes:
        nanodollars: billionths of a US dollar; None: not known.
        source: where it is from, with its version.
    """

    nanodollars: int | None
    source: str


@dataclass(frozen=True)
class Rate:
    """US dollars for a million tokens.

    Attributes:
        input: of the prompt.
        output: of the reply.
        cached: of the prompt, read from a cache; None: as ``input``.
        written: of the prompt, written to a cache; None: as ``input``.
    """

    input: Decimal
    output: Decimal
    cached: Decimal | None = None
    written: Decimal | None = None

    def price(self, usage: Usage) -> int:
        """Billionths of a dollar for a call."""
        fresh = usage.input_tokens - usage.cached_tokens - usage.written_tokens
        total = (
            fresh * self.input
            + usage.cached_tokens * (self.input if self.cached is None else self.cached)
            + usage.written_tokens * (self.input if self.written is None else self.written)
            + usage.output_tokens * self.output
        )
        return round(total * _NANO_PER_MILLIONTH)


class PriceList(Protocol):
    """Finds the price of calls to one model."""

    @property
    def is_known(self) -> bool:
        """Whether the price is known."""
        ...

    def price(self, usage: Usage) -> Price:
        """The price of a call."""
        ...


class Prices:
    """The prices of all models.

    ::

        prices = Prices.load(home.config / "prices.toml")
        tariff = await prices.find("anthropic:claude-sonnet-4-5", "https://api.anthropic.com")
        tariff.price(usage)

    Args:
        overrides: rates by the models' whole names.
        source: how the overrides are called, with their version.
    """

    def __init__(self, overrides: Mapping[str, Rate] | None = None, source: str = "") -> None:
        self._overrides = overrides or {}
        self._source = source

    @classmethod
    def load(cls, path: Path) -> Prices:
        """Read the override file; a missing one is an empty one.

        Raises:
            ConfigError: it cannot be read, or holds something that is no price.
        """
        try:
            data = path.read_bytes()
            table = tomllib.loads(data.decode())
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:  # not UTF-8, or not TOML
            raise ConfigError(f"{path}: not TOML: {error}") from error
        digest = hashlib.sha256(data).hexdigest()[:8]
        return cls({name: _rate(path, name, value) for name, value in table.items()}, f"{path.name} {digest}")

    async def find(self, model: str, where: str) -> PriceList:
        """The price list of a model.

        Args:
            model: its whole name.
            where: the address of its server.
        """
        if rate := self._overrides.get(model):
            return _Override(rate, self._source)
        name = parse(model)
        is_ours = name.provider in (ProviderKind.EMBEDDED, ProviderKind.OLLAMA) or is_private(where)
        if is_ours and not is_cloud(name.model):
            return _Local()
        # A quarter of a second to import: not on the event loop, and not before it is needed.
        await asyncio.to_thread(importlib.import_module, "genai_prices")
        return _Listed(name.model, where)


class _Override:
    """A rate of the override file."""

    is_known = True

    def __init__(self, rate: Rate, source: str) -> None:
        self._rate = rate
        self._source = source

    def price(self, usage: Usage) -> Price:
        return Price(self._rate.price(usage), self._source)


class _Local:
    """A model on a machine of one's own."""

    is_known = True

    def price(self, usage: Usage) -> Price:
        del usage
        return Price(0, _LOCAL)


class _Listed:
    """A model of the public list, if it is there."""

    def __init__(self, model: str, where: str) -> None:
        self._model = model
        self._where = where

    @property
    def is_known(self) -> bool:
        return self._find(None) is not None

    def price(self, usage: Usage) -> Price:
        found = self._find(usage)
        return found or Price(None, _UNKNOWN)

    def _find(self, usage: Usage | None) -> Price | None:
        import genai_prices  # noqa: PLC0415 - loaded by ``find`` already

        tokens = genai_prices.Usage()
        if usage is not None:
            tokens = genai_prices.Usage(
                input_tokens=usage.input_tokens,
                cache_read_tokens=usage.cached_tokens,
                cache_write_tokens=usage.written_tokens,
                output_tokens=usage.output_tokens,
            )
        try:
            found = genai_prices.calc_price(tokens, self._model, provider_api_url=self._where)
        except LookupError:
            return None
        return Price(round(found.total_price * 10**9), f"genai-prices {genai_prices.__version__}")


def is_private(where: str) -> bool:
    """Whether an address is of this host or of a private network, by its look; names are not resolved."""
    host = urlsplit(where).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost"


def _rate(path: Path, name: str, value: object) -> Rate:
    known = [field.name for field in fields(Rate)]
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {name!r} must be a section, ['{name}']")
    for key, number in value.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{path}: [{name!r}] has an unknown key {key!r}", hint=hint)
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < 1e6:
            raise ConfigError(f"{path}: [{name!r}] {key} must be dollars for a million tokens, not {number!r}")
    if missing := {"input", "output"} - value.keys():
        raise ConfigError(f"{path}: [{name!r}] has no {min(missing)!r}")
    return Rate(**{key: Decimal(str(number)) for key, number in value.items()})
