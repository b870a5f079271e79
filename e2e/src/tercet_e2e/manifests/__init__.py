"""Manifests that a local cluster gets, as files; `tercet_e2e.objects` applies them."""
