"""Firecracker on KVM: the client of its API, the place it runs in, its release, and the ``Vm`` made of them."""
