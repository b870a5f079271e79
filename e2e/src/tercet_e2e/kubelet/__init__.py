"""A stand-in for the kubelet: a real Node to the control plane, plain processes as containers.

What it does as the kubelet does it: registers Node and CSINode with a node's own certificate (Node
authoriser and NodeRestriction apply), renews the node's Lease, writes `volumesInUse` and honours
`volumesAttached`, makes the CSI node calls in the kubelet's order and recovers after a restart from
what it has on disk. What it does not: images, cgroups, probes, networks of pods, exec. A container
is a process of this machine in a mount and a PID namespace of its own, on a copy-on-write view of
the machine's root file system; `image` is ignored, `command` is required.

`model` and `decide` are pure; `node`, `volumes`, `containers` and `podfiles` carry out;
`loop` joins them.
"""
