"""The errors of this package, one tree for each boundary; each says what, which, and what to do.

E2eError
|- BinaryError      a tool that is not there and cannot be built
|- StateError       a state folder that cannot be used
|- ProcessError     a process that died or does not get ready
|- CleanupError     something of a cluster that would not go away
`- KubeError        an answer of the API server (in `kube`)
"""

from __future__ import annotations


class E2eError(Exception):
    """Base of all errors that a user of this package may see."""


class BinaryError(E2eError):
    """A tool could neither be found nor built."""


class StateError(E2eError):
    """A state folder cannot be used for this."""


class ProcessError(E2eError):
    """A process of the cluster died, or does not answer."""


class CleanupError(E2eError):
    """A process, mount or loop device of a cluster is still there."""
