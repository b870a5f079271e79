"""`make bench`: a volume's speed beside the disk's own floor, measured in one interleaved run."""
