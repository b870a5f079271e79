"""Marks are levels, not edges: nothing is lost, nothing runs twice at once, failures come back."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet_node.errors import EngineAway
from tercet_node.keyed import PAUSE_S_MAX, PAUSE_S_MIN, Keyed, pause_s


@contextlib.asynccontextmanager
async def running(handler, parallel=4):
    keyed = Keyed("test", handler, parallel=parallel)
    task = asyncio.create_task(keyed.run())
    try:
        yield keyed
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def settle():
    """Let everything run that is not waiting for time."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_mark_during_a_look_is_one_more_look():
    looks = []
    go = asyncio.Event()

    async def handler(key):
        looks.append(key)
        await go.wait()

    async with running(handler) as keyed:
        keyed.mark("v")
        await settle()
        for _ in range(5):
            keyed.mark("v")
        await settle()
        assert looks == ["v"], "one at a time for each key"
        go.set()
        await settle()
        assert looks == ["v", "v"]


async def test_keys_do_not_wait_for_each_other():
    done = []

    async def handler(key):
        if key == "stuck":
            await asyncio.sleep(60)
        done.append(key)

    async with running(handler, parallel=2) as keyed:
        keyed.mark_all(["stuck", "v", "w"])
        await settle()
        assert done == ["v", "w"]


async def test_failure_comes_back_and_time_asked_for_is_kept():
    looks = []
    done = asyncio.Event()

    async def handler(key):
        looks.append(asyncio.get_running_loop().time())
        if len(looks) == 1:
            raise EngineAway("not there")
        if len(looks) == 2:
            return 0.1
        done.set()
        return None

    async with running(handler) as keyed:
        keyed.mark("v")
        await asyncio.wait_for(done.wait(), 30)
        await settle()
    assert len(looks) == 3, "nobody asked for a fourth look"
    assert looks[1] - looks[0] >= PAUSE_S_MIN / 2
    assert looks[2] - looks[1] >= 0.1


async def test_what_nobody_foresaw_ends_the_agent():
    async def handler(key):
        raise ZeroDivisionError(key)

    keyed = Keyed("test", handler, parallel=2)
    keyed.mark("v")
    with pytest.raises(ExceptionGroup) as ended:
        await asyncio.wait_for(keyed.run(), 30)
    assert ended.group_contains(ZeroDivisionError)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_pause_is_bounded_and_has_jitter(failures, jitter):
    assert PAUSE_S_MIN / 2 <= pause_s(failures, jitter) <= PAUSE_S_MAX
    assert pause_s(failures, 1.0) == 2 * pause_s(failures, 0.0)
