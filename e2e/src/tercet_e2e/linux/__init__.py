"""Linux's own NVMe/TCP host against our target: engines without Kubernetes, machines to be a host.

network   a network namespace of this machine with a bridge: nodes and machines have addresses in it
engines   three engines in it, and an agent for each that follows objects in memory
guest     a virtual machine with Debian's kernel that does what it is told, command by command
nvme      what nvme-cli and the kernel say there, as types
"""
