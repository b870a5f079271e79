"""Tercet's operator: what the cluster's objects shall become, decided from what they are.

`world` is what has been observed, `decide_*` modules turn it into `actions` without touching
anything, `executor` carries them out, `watching` (kopf) keeps the world up to date, `reconciler`
decides which object is looked at next. The operator is on no path of I/O and never makes a node
primary after the first configuration: while it is away, every volume goes on and fails over.
"""

from tercet_api import plainlog as plainlog
