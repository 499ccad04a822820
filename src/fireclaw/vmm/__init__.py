"""VMMs: how a microVM is started, cloned, watched and ended, without knowing what its guest says.

``base`` is the contract, ``qemu`` a member of the family; ``process`` is the one gate through which the daemon's
children are made, ``host`` what must be known about this computer, ``accel`` the proof that KVM works here.
"""
