"""A virtual machine with Linux's own NVMe driver and emulated drives, in software emulation.

What the engine does to a drive past the block layer is shown on a kernel that has such a drive.
`parts` gets QEMU, Debian's kernel and busybox out of Debian's packages, `initramfs` makes the root
file system of one machine, `machine` boots it, runs one command in it and cuts its power. A machine
has no network and needs no KVM. Knows nothing of Kubernetes.
"""
