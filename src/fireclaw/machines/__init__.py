"""Machines: their life, the calls into them, snapshots and clones, what is adopted and what is pruned."""
