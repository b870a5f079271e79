"""Carries out what `authority` decides: the CA's Secret and ConfigMap, approval, certificate.

The Secret is made once, by whoever leads first, and never written again: `create` either makes it
or finds it. Each request is approved and then gets its certificate; between the two the operator
may die, and the next one goes on, because an approved request without a certificate is undecided.
"""

from __future__ import annotations

import base64
import uuid
from datetime import UTC, datetime
from typing import Any

import structlog

from tercet_api.clients import Api, Conflict, Json, NotFound
from tercet_api.names import CA_CONFIG_MAP, CA_SECRET, NAMESPACE
from tercet_operator.authority import Authority, Denied, Grant, NeedsReview, Request, judge
from tercet_operator.registerfile import RegisterFile
from tercet_operator.roll import Roll, signing_key
from tercet_operator.world import World

REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
SECRETS = f"/api/v1/namespaces/{NAMESPACE}/secrets"
CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
REVIEWS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
MESSAGE_CHARS_MAX = 1024

log = structlog.get_logger(__name__)


class Signer:
    """Signs for one cluster."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._authority: Authority | None = None

    async def open(self) -> None:
        """Load the CA, or make it. Raises ApiError."""
        try:
            secret = await self._api.request("GET", f"{SECRETS}/{CA_SECRET}")
        except NotFound:
            secret = await self._make_secret()
        data = {key: base64.b64decode(value) for key, value in secret["data"].items()}
        self._authority = Authority(data["tls.key"], data["tls.crt"])
        await self._publish(data["tls.crt"].decode())

    async def roll(self) -> Roll:
        """What enrols the nodes of this cluster, its register published. Raises ApiError."""
        assert self._authority is not None, "used before it was opened"
        system = await self._api.request("GET", "/api/v1/namespaces/kube-system")
        cluster = uuid.UUID(system["metadata"]["uid"])
        roll = Roll(signing_key(self._authority.secret), cluster)
        file = RegisterFile(self._api)
        roll.take_up(await file.read())
        await file.write(roll.register())
        return roll

    async def _make_secret(self) -> Json:
        key, certificate = Authority.draw(datetime.now(UTC))
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/tls",
            "immutable": True,
            "metadata": {"name": CA_SECRET},
            "data": {
                "tls.key": base64.b64encode(key).decode(),
                "tls.crt": base64.b64encode(certificate).decode(),
            },
        }
        try:
            made = await self._api.request("POST", SECRETS, body)
        except Conflict:  # another operator was first
            return await self._api.request("GET", f"{SECRETS}/{CA_SECRET}")
        log.info("certificate authority made", secret=CA_SECRET)
        return made

    async def _publish(self, certificate: str) -> None:
        """The public half, for everybody."""
        path, data = f"{CONFIG_MAPS}/{CA_CONFIG_MAP}", {"ca.crt": certificate}
        try:
            there = await self._api.request("GET", path)
        except NotFound:
            body = {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": CA_CONFIG_MAP},
                "data": data,
            }
            try:
                await self._api.request("POST", CONFIG_MAPS, body)
            except Conflict:
                return
        else:
            if there.get("data") != data:
                await self._api.request("PUT", path, {**there, "data": data})

    async def handle(self, item: Json, world: World) -> bool:
        """Sign or deny one undecided request; whether it was signed. Raises ApiError."""
        assert self._authority is not None, "used before it was opened"
        request = Request.of(item)
        try:
            verdict = judge(request, world.nodes)
            grant = await self._reviewed(verdict) if isinstance(verdict, NeedsReview) else verdict
        except Denied as error:
            log.warning("certificate denied", request=request.name, why=str(error))
            await self._decide(item, "Denied", "NotEntitled", str(error))
            return False
        approved = await self._decide(item, "Approved", "Entitled", f"for {grant.common_name}")
        certificate = self._authority.sign(grant, datetime.now(UTC), request.expiration_s)
        status = {**(approved.get("status") or {})}
        status["certificate"] = base64.b64encode(certificate).decode()
        path = f"{REQUESTS}/{request.name}/status"
        await self._api.request("PUT", path, {**approved, "status": status})
        log.info("certificate signed", request=request.name, subject=grant.common_name)
        return True

    async def _reviewed(self, verdict: NeedsReview) -> Grant:
        answer = await self._api.request("POST", REVIEWS, verdict.review)
        if not (answer.get("status") or {}).get("allowed"):
            user = verdict.review["spec"]["user"]
            raise Denied(
                f"{user} may not `use` certificates.tercet.io/admin: bind ClusterRole tercet-admin"
            )
        return verdict.grant

    async def _decide(self, item: Json, kind: str, reason: str, message: str) -> Json:
        status: dict[str, Any] = dict(item.get("status") or {})
        conditions = list(status.get("conditions") or ())
        if any(condition.get("type") == kind for condition in conditions):
            return item
        conditions.append(
            {
                "type": kind,
                "status": "True",
                "reason": reason,
                "message": message[:MESSAGE_CHARS_MAX],
            }
        )
        body = {**item, "status": {**status, "conditions": conditions}}
        path = f"{REQUESTS}/{item['metadata']['name']}/approval"
        return await self._api.request("PUT", path, body)
