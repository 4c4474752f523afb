"""A request to end a run, from any thread."""

import asyncio
import threading

import pytest

from agentctx.workflows.run import Stop


async def test_it_is_heard_inside_the_block_only_and_from_any_thread():
    stop, heard = Stop(), []
    with stop.heard(lambda: heard.append(threading.get_ident())):
        thread = threading.Thread(target=stop.request, args=("interrupted",))
        thread.start()
        thread.join()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    stop.request("again")
    await asyncio.sleep(0)
    assert heard == [threading.get_ident()]
    assert (stop.reason, stop.cancelled) == ("interrupted", True)


@pytest.mark.parametrize("twice", [False, True])
async def test_waiting_ends_with_the_request(twice):
    stop = Stop()
    waiting = [asyncio.create_task(stop.requested(twice=twice)) for _ in range(3)]
    await asyncio.sleep(0)
    stop.request("first")
    done, _ = await asyncio.wait(waiting, timeout=0.05 if twice else None)
    assert len(done) == (0 if twice else 3)
    stop.request("second")
    await asyncio.gather(*waiting)
    await stop.requested(twice=True)


async def test_a_loop_that_is_gone_is_not_told():
    stop = Stop()
    loop = asyncio.new_event_loop()

    async def listen():
        return stop.heard(lambda: None).__enter__()

    await asyncio.to_thread(loop.run_until_complete, listen())
    loop.close()
    stop.request("interrupted")
    assert stop.reason == "interrupted"
