"""The list of nodes, asked of the agents: `node members`, `lock`, `unlock`, `check`.

The list is each node's own (docs/membership.md): so an answer is one node's, and `check` compares
those of all that were asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio

from tercet_api.clients import Api, storage_nodes
from tercet_api.objects import StorageNode
from tercet_api.protos import agent_pb2, agent_pb2_grpc
from tercet_cli.access import Credentials, agent, credentials
from tercet_cli.errors import EXIT_NO, EXIT_OK, AgentRefuses, CliError, NotFound
from tercet_cli.output import Form, print_json, print_table, progress

CALL_TIMEOUT_S = 10.0
AGREE_S = 5.0
"""How long news on its way may keep lists apart."""
AGAIN_S = 0.5
DIGITS_SHOWN = 12
NONE = "-"

T = TypeVar("T")
Call = Callable[[agent_pb2_grpc.AgentStub], Awaitable[T]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which nodes a command is for."""

    names: tuple[str, ...]
    everywhere: bool


async def show(api: Api, name: str | None, form: Form) -> int:
    """One node's list."""
    nodes = await _nodes(api, Chosen((name,) if name else (), name is None))
    held = await credentials(api)
    found = await _first(nodes, held)
    if form is Form.JSON:
        print_json(_as_json(found))
        return EXIT_OK
    rows = [
        [
            str(member.nid),
            member.name or NONE,
            member.state,
            member.address,
            member.instance,
            str(member.incarnation),
        ]
        for member in found.members
    ]
    print_table(["NID", "NAME", "STATE", "ADDRESS", "INSTANCE", "INCARNATION"], rows)
    print()
    locked = ", LOCKED" if found.locked else ""
    print(f"as {found.node} has it: {found.size} nodes, digest {found.digest}{locked}")
    return EXIT_OK


async def lock(api: Api, chosen: Chosen, form: Form, *, locked: bool) -> int:
    """Lock or unlock the lists of these nodes."""
    nodes = await _nodes(api, chosen)
    held = await credentials(api)
    request = agent_pb2.LockMembersRequest(locked=locked)
    answers = await _ask_all(
        nodes, held, lambda stub: stub.LockMembers(request, timeout=CALL_TIMEOUT_S)
    )
    if form is Form.JSON:
        print_json({"nodes": [{"node": a.node, "locked": a.locked} for a in answers]})
        return EXIT_OK
    print_table(["NODE", "LOCKED"], [[a.node, str(a.locked).lower()] for a in answers])
    return EXIT_OK


async def check(api: Api, chosen: Chosen, form: Form) -> int:
    """Have these nodes check; exit status 1: their lists differ."""
    nodes = await _nodes(api, chosen)
    async with progress("checking"):
        held = await credentials(api)
        request = agent_pb2.CheckMembersRequest()
        checked = await _ask_all(
            nodes, held, lambda stub: stub.CheckMembers(request, timeout=CALL_TIMEOUT_S)
        )
        found = await _settled(nodes, held)
    agree = len({answer.digest for answer in found}) == 1
    repaired = {answer.node: answer.repaired for answer in checked}
    if form is Form.JSON:
        rows = [
            {"node": a.node, "size": a.size, "digest": a.digest, "repaired": repaired[a.node]}
            for a in found
        ]
        print_json({"agree": agree, "nodes": rows})
    else:
        print_table(
            ["NODE", "SIZE", "DIGEST", "REPAIRED"],
            [[a.node, str(a.size), a.digest[:DIGITS_SHOWN], str(repaired[a.node])] for a in found],
        )
        print()
        print(f"the lists of {len(found)} nodes {'agree' if agree else 'DIFFER'}")
    return EXIT_OK if agree else EXIT_NO


def _as_json(found: agent_pb2.MembersResponse) -> dict[str, Any]:
    return {
        "node": found.node,
        "nid": found.nid,
        "size": found.size,
        "digest": found.digest,
        "locked": found.locked,
        "members": [
            {
                "nid": member.nid,
                "name": member.name,
                "uid": member.uid,
                "instance": member.instance,
                "address": member.address,
                "incarnation": member.incarnation,
                "state": member.state,
            }
            for member in found.members
        ],
    }


async def _nodes(api: Api, chosen: Chosen) -> list[StorageNode]:
    """Those that are meant, by name."""
    if not chosen.names and not chosen.everywhere:
        raise CliError("no node is named", "name some, or say --all")
    if chosen.names and chosen.everywhere:
        raise CliError("--all and names", "say one of them")
    found = {node.name: node for node in await storage_nodes(api).list()}
    if missing := [name for name in chosen.names if name not in found]:
        raise NotFound(f"no StorageNode {', '.join(missing)}", "see them: tercet node list")
    if not found:
        raise NotFound("there is no StorageNode", "see docs/operations.md, Install")
    return [found[name] for name in sorted(chosen.names or found)]


async def _settled(
    nodes: Sequence[StorageNode], held: Credentials
) -> list[agent_pb2.MembersResponse]:
    """The lists, when they agree or have had their time to."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + AGREE_S
    while True:
        found = await _ask_all(nodes, held, _members)
        if len({answer.digest for answer in found}) == 1 or loop.time() > give_up_s:
            return found
        await asyncio.sleep(AGAIN_S)


async def _first(nodes: Sequence[StorageNode], held: Credentials) -> agent_pb2.MembersResponse:
    """Of the first node that answers."""
    error: AgentRefuses | None = None
    for node in nodes:
        try:
            return await _ask(node, held, _members)
        except AgentRefuses as refused:
            error = error or refused
    assert error is not None, "there is a node"
    raise error


async def _members(stub: agent_pb2_grpc.AgentStub) -> agent_pb2.MembersResponse:
    request = agent_pb2.MembersRequest()
    answer: agent_pb2.MembersResponse = await stub.Members(request, timeout=CALL_TIMEOUT_S)
    return answer


async def _ask_all(nodes: Sequence[StorageNode], held: Credentials, call: Call[T]) -> list[T]:
    """All of them; raises what went wrong with the first that did."""
    answers = await asyncio.gather(
        *(_ask(node, held, call) for node in nodes), return_exceptions=True
    )
    found: list[T] = []
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        found.append(answer)
    return found


async def _ask(node: StorageNode, held: Credentials, call: Call[T]) -> T:
    try:
        async with agent(node, held) as stub:
            return await call(stub)
    except grpc.aio.AioRpcError as error:
        where = f"node {node.name} ({node.spec.address}:{node.spec.ports.agent})"
        raise AgentRefuses(
            f"{where}: {error.code().name}: {error.details()}", _next_step(node.name, error.code())
        ) from error


def _next_step(name: str, code: grpc.StatusCode) -> str:
    steps = {
        grpc.StatusCode.FAILED_PRECONDITION: f"tercet node unlock {name}",
        grpc.StatusCode.PERMISSION_DENIED: "use credentials of an administrator (--context)",
        grpc.StatusCode.UNIMPLEMENTED: "its agent is of an older version: finish the upgrade",
    }
    return steps.get(code, f"see whether it is Ready: tercet node get {name}; or name others")
