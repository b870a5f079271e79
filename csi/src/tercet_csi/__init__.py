"""Tercet's CSI driver: the controller turns calls into objects, the node mounts volumes."""
