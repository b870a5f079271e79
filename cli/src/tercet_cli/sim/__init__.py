"""Simulations that a person runs: `tercet sim ...`. Needs the extra `tercet-cli[sim]`."""
