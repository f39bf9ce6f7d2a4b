"""The hub in memory: every listener gets every event once and in order, and none is waited for."""

import threading
from contextlib import AsyncExitStack

import anyio
import anyio.lowlevel
import pytest

from inference.errors import ListenerTooSlow
from inference.progress.events import CompletionEvent, ProgressEvent
from inference.progress.hub import BUFFER, KEPT, START, MemoryHub, Published, _Bell, _Listener, install, installed

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    """Listeners live in either loop."""
    return request.param


@pytest.fixture
def hub():
    """A hub that tells everything at once."""
    hub = MemoryHub(interval_s=0)
    yield hub
    hub.close()


def progress(number: int = 0, *, project: str = "film", task: str = "director") -> ProgressEvent:
    """An event that can be told from others by its message."""
    return ProgressEvent(
        project_id=project, task_name=task, progress=0, progress_percent=0, status="processing", message=str(number)
    )


def say(hub, numbers, **of) -> None:
    """Publishes events with these numbers."""
    for number in numbers:
        hub.publish(progress(number, **of))


def numbers(published) -> list[int]:
    """Which events these are."""
    return [int(each.event.message) for each in published]


async def take(subscription, count: int) -> list[Published]:
    """The next events of a subscription."""
    events = aiter(subscription)
    with anyio.fail_after(5):
        return [await anext(events) for _ in range(count)]


async def test_a_listener_gets_each_event_once_and_in_order_from_any_thread(hub):
    """Also where it sleeps in between; and what is published for another project does not reach it."""
    async with hub.subscribe("film") as one, hub.subscribe("film") as other:
        thread = threading.Thread(target=say, args=(hub, range(100)))
        thread.start()
        heard = await take(one, 100)
        thread.join()
        say(hub, [1], project="another")
        say(hub, [100])
        heard += await take(one, 1)
        assert numbers(heard) == numbers(await take(other, 101)) == list(range(101))
    ids = [tuple(map(int, each.id.split("-"))) for each in heard]
    assert ids == sorted(set(ids))
    assert heard[0].json == heard[0].event.model_dump_json()


async def test_a_listener_sleeps_until_there_is_something(hub):
    """It is woken from another thread, once for all that came in the meantime."""
    async with hub.subscribe("film") as subscription, anyio.create_task_group() as tasks:
        heard = 0

        async def listen():
            nonlocal heard
            async for published in subscription:
                assert int(published.event.message) == heard
                heard += 1

        tasks.start_soon(listen)
        await anyio.wait_all_tasks_blocked()
        say(hub, range(3))
        with anyio.fail_after(5):
            while heard < 3:
                await anyio.lowlevel.checkpoint()
        hub.close()


async def test_a_late_listener_sees_how_far_every_task_is(hub):
    """Without an id it gets the newest event of each task, in order, and then follows."""
    say(hub, [1, 2], task="writer")
    say(hub, [3, 4], task="director")
    say(hub, [5], task="writer")
    async with hub.subscribe("film") as subscription:
        assert not subscription.resumed
        assert numbers(subscription.snapshot) == [4, 5]
        say(hub, [6])
        assert numbers(await take(subscription, 1)) == [6]


async def test_a_listener_goes_on_where_it_was(hub):
    """After an id that is kept; from the start on while nothing is gone, however much that is."""
    say(hub, range(KEPT))
    async with hub.subscribe("film", START) as subscription:
        assert subscription.resumed
        heard = await take(subscription, KEPT)
        assert numbers(heard) == list(range(KEPT))
    async with hub.subscribe("film", heard[-3].id) as subscription:
        assert subscription.resumed
        assert subscription.snapshot == []
        say(hub, [KEPT])
        assert numbers(await take(subscription, 3)) == [KEPT - 2, KEPT - 1, KEPT]
    for gone in (START, heard[0].id, "7-0", "no id"):
        async with hub.subscribe("film", gone) as subscription:
            assert not subscription.resumed, gone
            assert numbers(subscription.snapshot) == [KEPT], gone


async def test_who_reads_too_slowly_is_ended_and_nobody_else_notices(hub):
    """Its buffer is bounded; others get what it missed."""
    async with hub.subscribe("film") as slow, hub.subscribe("film") as quick:
        for number in range(BUFFER + 1):
            say(hub, [number])
            assert numbers(await take(quick, 1)) == [number]
        with pytest.raises(ListenerTooSlow, match="connect again"):
            await take(slow, 1)


async def test_closing_ends_subscriptions_after_what_was_published(hub):
    """A listener gets the last events and then an end, and so does who comes later."""
    async with hub.subscribe("film") as subscription:
        say(hub, [1])
        hub.close()
        say(hub, [2])
        assert numbers([each async for each in subscription]) == [1]
    async with hub.subscribe("film") as subscription:
        assert numbers([each async for each in subscription]) == []


async def test_events_of_elsewhere_keep_their_ids(hub):
    """And one that came already is ignored."""
    event = progress(1)
    async with hub.subscribe("film", START) as subscription:
        for each in ("5-0", "5-1", "5-0", "6-0"):
            hub.feed("film", Published(each, event, "{}"))
        assert [each.id for each in await take(subscription, 3)] == ["5-0", "5-1", "6-0"]
    hub.forget("film")
    for gone in ("5-1", START):
        async with hub.subscribe("film", gone) as subscription:
            assert not subscription.resumed, gone
            assert subscription.snapshot == []
    assert not hub._streams["film"].listeners


def test_a_listener_whose_loop_is_gone_is_forgotten(hub, anyio_backend):
    """A loop that ended without ending the subscription costs nobody an error."""

    async def begin():
        listener = _Listener(_Bell(anyio.lowlevel.current_token().native_token))
        hub._stream("film").welcome(listener, None)
        with anyio.move_on_after(0):
            await anext(listener)

    anyio.run(begin, backend=anyio_backend)
    assert hub._streams["film"].listeners
    say(hub, range(2))
    assert not hub._streams["film"].listeners


def test_ids_grow_although_the_clock_was_set_back(hub):
    """They are milliseconds as long as the clock runs, and count on from the last one otherwise."""
    hub._last_id = (10**15, 3)
    say(hub, range(2))
    assert [each.id for each in hub._streams["film"]._kept] == [f"{10**15}-4", f"{10**15}-5"]


def test_projects_are_forgotten_an_hour_after_their_last_event():
    """So a server that runs for months holds what is of today."""
    now = 0.0
    hub = MemoryHub(interval_s=0, clock=lambda: now)
    say(hub, [1], project="old")
    now = 3599.0
    say(hub, [1], project="new")
    assert set(hub._streams) == {"old", "new"}
    now = 3599.0 + 3600
    say(hub, [2], project="new")
    assert set(hub._streams) == {"new"}
    hub.close()


def test_publishing_raises_nothing(hub):
    """Neither for what JSON has no form for, nor for text that cannot be encoded, nor on a closed hub."""
    event = progress()
    for metadata in ({"path": object}, {"text": "\ud800"}):
        hub.publish(event.model_copy(update={"metadata": metadata}))
    assert "class 'object'" in hub._streams["film"]._kept[0].json
    assert len(hub._streams["film"]._kept) == 1
    hub.close()
    hub.publish(CompletionEvent(project_id="film", task_name="director"))


def test_a_process_has_one_hub(hub):
    """Trackers find it there; none is installed to begin with."""
    assert installed() is None
    install(hub)
    assert installed() is hub
    install(None)
    assert installed() is None


async def test_listeners_of_one_loop_are_called_once_for_an_event(hub):
    """However many there are; the next event calls again."""
    async with AsyncExitStack() as stack:
        subscriptions = [await stack.enter_async_context(hub.subscribe("film")) for _ in range(5)]
        [bell] = hub._bells.values()
        calls, call_soon = [], bell._call_soon
        bell._call_soon = lambda function: (calls.append(function), call_soon(function))
        for number in (1, 2):
            async with anyio.create_task_group() as tasks:
                for subscription in subscriptions:
                    tasks.start_soon(take, subscription, 1)
                await anyio.wait_all_tasks_blocked()
                say(hub, [number])
            assert len(calls) == number
    assert not hub._bells
