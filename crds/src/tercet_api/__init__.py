"""Tercet's objects, names and rules. Importing the package imports no Kubernetes client."""
