"""CSI Controller: calls become objects, answers wait for their status."""
