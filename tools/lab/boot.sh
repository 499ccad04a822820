#!/bin/sh
# PID 1 of L1, after the initrd: mounts what programs expect, runs the jobs, switches off.
# A shell, because a shell reaps whatever the jobs leave to PID 1.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root TMPDIR=/lab/tmp
chgrp kvm /dev/kvm
chmod 660 /dev/kvm
mount -t sysfs sys /sys
mount -t cgroup2 cgroup /sys/fs/cgroup
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
ln -s /proc/self/fd /dev/fd
ip link set lo up
hostname lab
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done
python3 -S /lab/checkout/tools/lab/inside.py </dev/null
sync
exec busybox poweroff -f
