"""`make bench`: a volume's speed beside the disk's own floor, measured in one interleaved run.

`bench noderep`: the node's table beside locks and maps, in the same rows.
"""
