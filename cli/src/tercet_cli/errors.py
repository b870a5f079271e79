"""What can go wrong for a person at the command line, as one tree.

    CliError
    |- NotFound        no such object in the cluster
    |- ClusterAway     no cluster can be reached with this kubeconfig
    |- Denied          these credentials may not do that
    |- NotComparable   replicas cannot be compared now
    `- AgentRefuses    a node's agent does not answer, or will not do that

Each says what is wrong and what to do next; all end the command with exit status 2. Exit status 1
is kept for an answer that is no (`volume verify`: the replicas differ; `node check`: the lists do).
"""

from __future__ import annotations

from tercet_api.clients import ApiError, Forbidden, Unreachable
from tercet_api.clients import NotFound as ApiNotFound

EXIT_OK = 0
EXIT_NO = 1
EXIT_ERROR = 2


class CliError(Exception):
    """A command cannot be done: what is wrong, and the next step."""

    def __init__(self, message: str, next_step: str) -> None:
        super().__init__(message)
        self.next_step = next_step


class NotFound(CliError):
    """There is no such object."""


class ClusterAway(CliError):
    """No API server answers, or the kubeconfig names none."""


class Denied(CliError):
    """The credentials do not suffice."""


class NotComparable(CliError):
    """No statement about the replicas can be made now."""


class AgentRefuses(CliError):
    """A node's agent cannot be reached, or does not do what was asked."""


def of_api(error: ApiError) -> CliError:
    """An error of the API server in a person's words."""
    message = str(error)
    if isinstance(error, ApiNotFound):
        if "could not find the requested resource" in message or "page not found" in message:
            return NotFound(message, "install Tercet's CRDs: kubectl apply -f crds/manifests")
        return NotFound(message, "see what there is: tercet volume list, tercet node list")
    if isinstance(error, Forbidden):
        return Denied(message, "use credentials that may (--context), or ask for a ClusterRole")
    if isinstance(error, Unreachable):
        return ClusterAway(message, "check --kubeconfig, KUBECONFIG and --context")
    return CliError(message, "look at the operator's and the agents' logs")
