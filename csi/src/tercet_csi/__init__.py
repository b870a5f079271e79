"""Tercet's CSI driver: the controller turns calls into objects, the node mounts volumes."""

from tercet_api import plainlog as plainlog
