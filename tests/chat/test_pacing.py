"""How waits grow, how a rate limit slows all, and how an outage is told."""

import asyncio
import logging

from mmpo_jax.chat.pacing import JITTER, Backoff, Outage, Pace


def test_waits_double_up_to_the_longest():
    backoff = Backoff(first=1, longest=10)
    for retry, longest in enumerate([1, 2, 4, 8, 10, 10], 1):
        waits = [backoff.seconds(retry) for _ in range(200)]
        assert longest * (1 - JITTER) <= min(waits) < max(waits) <= longest
    assert backoff.seconds(10_000) <= 10


def resumes(pace):
    return pace._resumes


def test_a_rate_limit_halves_the_pace_once_and_replies_raise_it_again():
    pace = Pace("server", 16, Backoff(first=1, longest=10))
    assert pace.limit == 16
    pace.rate_limited(sent=1.0, now=2.0, wait=0.0)
    assert 2.75 <= resumes(pace) <= 3.0
    pace.rate_limited(sent=1.5, now=3.1, wait=0.0)  # sent before it was halved
    assert pace.limit == 8 and resumes(pace) == 3.1
    pace.rate_limited(sent=4.2, now=4.3, wait=50.0)
    assert pace.limit == 4 and resumes(pace) == 54.3
    for now in (5.0, 6.0, 7.0):
        pace.rate_limited(sent=now - 0.1, now=now, wait=1.0)
    assert pace.limit == 1 and resumes(pace) == 54.3
    for _ in range(1000):
        pace.replied()
    assert pace.limit == 16


def test_waits_for_a_rate_limit_grow_until_there_is_a_reply(caplog):
    pace = Pace("server", 16, Backoff(first=4, longest=100))
    for now, wait in ((100, 4), (200, 8), (300, 16)):
        pace.rate_limited(sent=now, now=now, wait=0.0)
        assert 0.75 * wait <= resumes(pace) - now <= wait
    assert pace.limited_for(310.0) == 210.0
    pace.replied()
    assert pace.limited_for(310.0) == 0.0
    pace.rate_limited(sent=400, now=400, wait=0.0)
    assert resumes(pace) - 400 <= 4 and pace.limited_for(401.0) == 1.0
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and told[1].startswith("server has too many requests; waiting 1")
    assert told[1].endswith("s, then 2 at a time")


def test_turns_are_given_in_order_also_where_somebody_leaves():
    async def work():
        pace, order, release = Pace("server", 2, Backoff()), [], asyncio.Event()

        async def take(number):
            async with pace.turn():
                order.append(number)
                await release.wait()

        tasks = [asyncio.create_task(take(number)) for number in range(6)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == [0, 1]
        tasks[2].cancel()  # while it waits
        tasks[0].cancel()  # while it holds a place
        await asyncio.gather(tasks[0], tasks[2], return_exceptions=True)
        await asyncio.sleep(0)
        assert order == [0, 1, 3]
        release.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 1, 3, 4, 5]
        tasks = [asyncio.create_task(take(number)) for number in (6, 7)]
        tasks[0].cancel()  # before it began
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order[5:] == [7] and pace._under_way == 0

    asyncio.run(work())


def test_turns_after_a_rate_limit_wait_and_are_fewer():
    async def work():
        pace, clock, began = Pace("server", 4, Backoff()), asyncio.get_running_loop().time, []

        async def take():
            async with pace.turn():
                began.append(clock())
                await asyncio.sleep(0.1)

        limited_at = clock()
        pace.rate_limited(sent=limited_at, now=limited_at, wait=0.2)
        await asyncio.gather(*(take() for _ in range(4)))
        assert began[0] >= limited_at + 0.2 and began[2] >= began[1] + 0.1

    asyncio.run(work())


def test_an_outage_is_told_every_ten_seconds(caplog):
    caplog.set_level(logging.WARNING)
    outage = Outage("chat server", longest=30)
    over = [outage.failed(now / 10, "Connection refused") for now in range(1000, 1301)]
    assert over.index(True) == 300
    assert [record.message for record in caplog.records] == [
        "chat server cannot be reached: Connection refused; trying again",
        "chat server cannot be reached for 10 s, of 30",
        "chat server cannot be reached for 20 s, of 30",
        "chat server cannot be reached for 30 s, of 30",
    ]
    outage.over(131.0)
    outage.over(132.0)
    assert caplog.records[-1].message == "chat server answers again after 31 s"
    assert len(caplog.records) == 5
    assert not outage.failed(200.0, "again")
