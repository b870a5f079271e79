"""The membership at work: sockets, clock, files and objects around the machines of `membership`.

    roster, keep, tls -> link -> mesh -> runner -> service
                                 figures /

`roster` reads what the operator has signed, `keep` is the list's file, `tls` says who a certificate
is of; `link` is one connection, `mesh` all of them, `runner` drives one node's machine, `service`
is the agent's part: when there is a node to run, and what it is told of the cluster's objects.

Nothing here decides: what is sent, believed and judged is the machines' (tercet_node.membership).
"""
