"""The image of a kind node, made without any registry: Debian's packages and pinned Go modules.

`archive` writes images, `components` the control plane's own, `root` the node's file system,
`build` puts them together and keeps the result in the cache, by the versions of all that goes into
it. The files that are put into it stand in `e2e/kind-image/`; what kind itself has for its nodes
(entrypoint, units) is taken from kind's module when the image is made.
"""
