"""IRC: our own client, a managed server, and the overseer that takes commands in ``#control``.

From the bottom: ``message``, ``text``, ``throttle`` and ``events`` are values; ``session`` (with ``roster`` and
``whois``) and ``sendqueue`` are the sans-I/O core; ``client`` (with ``answers`` and ``delivery``) is its asyncio
shell; ``verbs`` and ``overseer`` are the control plane on top of it; ``ngircd`` describes the server that Fireclaw
starts where the configuration names no other.
"""

from fireclaw.irc.client import Backoff, IrcClient, ServerAddress, State
from fireclaw.irc.delivery import Delivery, DroppedError
from fireclaw.irc.events import (
    Event,
    Invited,
    Joined,
    Kicked,
    Lost,
    Message,
    Parted,
    Quit,
    Ready,
    Renamed,
    Reply,
    Whois,
)
from fireclaw.irc.message import Kind, Prefix, check_target, fold, is_channel
from fireclaw.irc.session import Identity
from fireclaw.irc.throttle import Rate

__all__ = [
    "Backoff",
    "Delivery",
    "DroppedError",
    "Event",
    "Identity",
    "Invited",
    "IrcClient",
    "Joined",
    "Kicked",
    "Kind",
    "Lost",
    "Message",
    "Parted",
    "Prefix",
    "Quit",
    "Rate",
    "Ready",
    "Renamed",
    "Reply",
    "ServerAddress",
    "State",
    "Whois",
    "check_target",
    "fold",
    "is_channel",
]
