"""Tercet's agent: one for each node, beside the engine whose control it is."""

from tercet_api import plainlog as plainlog
