"""How waits grow, how a rate limit slows all, and how an outage is told."""

import logging

from mmpo_jax.chat.pacing import JITTER, Backoff, Outage, Pace


def test_waits_double_up_to_the_longest():
    backoff = Backoff(first=1, longest=10)
    for retry, longest in enumerate([1, 2, 4, 8, 10, 10], 1):
        waits = [backoff.seconds(retry) for _ in range(200)]
        assert longest * (1 - JITTER) <= min(waits) < max(waits) <= longest
    assert backoff.seconds(10_000) <= 10


def test_a_rate_limit_halves_the_pace_once_and_replies_raise_it_again():
    pace = Pace(16)
    assert pace.limit == 16
    pace.rate_limited(sent=1.0, now=2.0, wait=0.0)
    pace.rate_limited(sent=1.5, now=2.1, wait=0.0)  # sent before it was halved
    assert pace.limit == 8 and pace.resumes <= 2.1
    pace.rate_limited(sent=2.2, now=2.3, wait=5.0)
    assert pace.limit == 4 and pace.resumes == 7.3
    pace.rate_limited(sent=2.4, now=2.5, wait=1.0)
    pace.rate_limited(sent=2.6, now=2.7, wait=1.0)
    pace.rate_limited(sent=2.8, now=2.9, wait=1.0)
    assert pace.limit == 1 and pace.resumes == 7.3
    for _ in range(1000):
        pace.replied()
    assert pace.limit == 16


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
