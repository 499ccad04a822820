"""The lab: a virtual machine with KVM inside, for tests that need bare metal, on a host that is none.

::

    __main__    the command: arguments, progress, exit status
    ├── disk        L1's kernel, initrd and root, made of Debian packages once
    ├── payload     a drive with this checkout, its libraries, images and the Firecracker to be tested
    ├── programs    the Firecracker to be tested
    ├── machine     L1 itself: QEMU with a software CPU that has SVM
    ├── jobs        what runs in L1 (jobs.toml)
    └── results     what came out of it
    inside, smoke   run in L1, by its own Python; boot.sh starts them
    table       the results in the documentation

L0 is the host, L1 the lab's machine, L2 the microVMs that the tests start in it.
"""
