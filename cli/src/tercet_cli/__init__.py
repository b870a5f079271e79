"""Tercet's command line: `tercet`, also `kubectl tercet`."""
