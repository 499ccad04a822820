"""Fireclaw: AI agents on IRC, each with a microVM of its own for its hands."""

__version__ = "0.1.0"
