"""Agents: persona, conversation and turn on the host, hands in a machine.

``engine`` decides (sans-I/O), ``agent`` carries out, ``speaker`` says, ``manager`` keeps them all. What they need of
the rest of the house stands in ``ports``.
"""
