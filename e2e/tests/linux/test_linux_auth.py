"""DH-HMAC-CHAP as Linux 6.12 does it (Debian's 6.1 cannot): right and wrong secrets, both ways.

The secrets are nvme-cli's own, so the form, its check value and the transformation by the host's
name are judged as well.
"""

from __future__ import annotations

import pytest
import pytest_asyncio

from conftest import volume_for
from tercet_e2e.linux.guest import Guest
from tercet_e2e.linux.nvme import OPTIONS, Host, fio

pytestmark = [pytest.mark.linux, pytest.mark.asyncio(loop_scope="session")]

SUITE = "bookworm-backports"
# The strongest hash and the smallest group that both have (docs/nvme-tcp.md, Authentication).
AGREED = "authenticated with hash hmac(sha512) dhgroup ffdhe2048"
# Of nvme gen-dhchap-key: as it is, or transformed with SHA-256, SHA-384, SHA-512.
HASHES = {"plain": (0, 32), "sha256": (1, 32), "sha384": (2, 48), "sha512": (3, 64)}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def newer(machine):
    """A machine with the newer kernel."""
    async with machine(3, SUITE) as running:
        print("linux: " + await running.run("uname -r"), flush=True)
        yield running


async def secret(guest: Guest, name: str = "plain") -> str:
    """A fresh one, made by nvme-cli."""
    kind, length = HASHES[name]
    words = f"nvme gen-dhchap-key -m {kind} -l {length} -n {guest.host_nqn}"
    return (await guest.run(words)).strip()


def words(own: str | None, of_controller: str | None = None) -> str:
    """Options that connect with these secrets."""
    given = OPTIONS
    given += f" --dhchap-secret={own}" if own else ""
    return given + (f" --dhchap-ctrl-secret={of_controller}" if of_controller else "")


async def refused(host: Host, address: str, options: str) -> None:
    """This connection does not come about, for that reason, and leaves no path."""
    done = await host.guest.attempt(host.connect_words(address, options))
    assert done.code != 0, done.text
    assert not await host.paths()
    said = "\n".join(await host.kernel_said())
    assert "authentication" in said, said


@pytest.mark.parametrize("name", HASHES)
async def test_a_host_with_the_right_secret_is_let_in(name, engines, newer):
    own = await secret(newer, name)
    async with volume_for(engines, newer, host_secret=own) as host:
        await host.connect_all(engines.nodes[0].address, words(own))
        await host.wait_live(len(engines.nodes))
        said = await host.kernel_said()
        assert sum(AGREED in line for line in said) >= len(engines.nodes), said
        device = await host.device()
        await newer.run(fio(device, 4))


async def test_both_sides_show_that_they_know_a_secret(engines, newer):
    own, theirs = await secret(newer, "sha256"), await secret(newer, "sha512")
    attached = {"host_secret": own, "controller_secret": theirs}
    async with volume_for(engines, newer, **attached) as host:
        for node in engines.nodes:  # connect-all of nvme-cli 2.3 takes no controller's secret
            await host.connect(node.address, words(own, theirs))
        await host.wait_live(len(engines.nodes))
        device = await host.device()
        primary = await engines.wait_serving(host.volume)
        engines.signal(primary)  # reconnects authenticate as well
        await newer.run(fio(device, 4), 300)
        await host.wait_live(len(engines.nodes))


async def test_a_host_with_a_wrong_secret_or_none_stays_outside(engines, newer):
    own, other = await secret(newer), await secret(newer)
    address = engines.nodes[0].address
    async with volume_for(engines, newer, host_secret=own) as host:
        await refused(host, address, words(other))
        await refused(host, address, words(None))
        await host.connect(address, words(own))
        await host.wait_live(1)


async def test_linux_refuses_controllers_that_do_not_know_their_secret(engines, newer):
    own, theirs, other = await secret(newer), await secret(newer), await secret(newer)
    address = engines.nodes[0].address
    attached = {"host_secret": own, "controller_secret": theirs}
    async with volume_for(engines, newer, **attached) as host:
        await refused(host, address, words(own, other))
        await host.connect(address, words(own, theirs))
        await host.wait_live(1)
