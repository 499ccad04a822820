"""The language that host and guest speak: hello, multiplexer, frames. Standard library only, no I/O."""
