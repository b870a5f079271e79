"""Clusters for Tercet: what they run on (providers), what breaks them (faults), what proves it.

`local` is the provider for a machine of one's own: a real Kubernetes control plane, the upstream
CSI sidecars and Tercet itself, all as plain processes below one state folder.
"""
