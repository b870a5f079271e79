"""A Docker Engine for tests and image builds: the machine's own, or one that is ours and ends.

`debian` gets programs out of Debian's packages without installing them, `engine` runs the daemon
below the cache, `traces` takes away what a daemon leaves in the kernel, `commands` is the command
line. Knows nothing of Kubernetes.
"""
