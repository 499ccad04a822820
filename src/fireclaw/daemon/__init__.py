"""The daemon: the one owner of machines, agents, IRC and the way to models. Everything else is its client."""
