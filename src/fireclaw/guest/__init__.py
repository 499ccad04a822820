"""guestd, PID 1 of every machine. Standard library only; it is shipped into the runtime.

``init`` boots, ``workload`` makes the namespaces in which commands run, ``spawner`` starts them there, ``session``
speaks to the host, ``loop`` waits for everything.
"""
