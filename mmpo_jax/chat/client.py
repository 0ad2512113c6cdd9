"""The chat client: thousands of requests, each answered once, whatever happens on the way.

An event loop in a thread of its own sends them, so that several threads may ask at once. What was
answered is in a journal before anybody sees it, and is never sent again.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from etils import epath

from mmpo_jax.chat import availability
from mmpo_jax.chat.asking import Asker
from mmpo_jax.chat.connection import Connection
from mmpo_jax.chat.counts import ChatCounts, Tally
from mmpo_jax.chat.journal import Journal
from mmpo_jax.chat.pacing import Backoff
from mmpo_jax.chat.replies import PASSING, PERMANENT, ChatFailure, ChatReply, Outcome
from mmpo_jax.chat.requests import ChatRequest
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.core import progress
from mmpo_jax.core.errors import DataError, MmpoError

GIVEN_UP = 20
"""Requests in a row without a reply after which the server has to show that it gives any."""

CLOSING_SECONDS = 5.0
"""Seconds that closing may take."""

ENCODERS = 4
"""Threads that read and encode images."""

KEPT = "what was answered is kept, and the same command goes on from there"


@dataclasses.dataclass(eq=False)
class _Job:
    """A request that somebody waits for."""

    key: str
    request: ChatRequest
    future: Future[Outcome] = dataclasses.field(default_factory=Future)
    waiters: int = 1
    """Calls of `ask` that wait for it; what nobody waits for is not sent."""
    task: asyncio.Task[None] | None = None


class ChatClient:
    """Asks a chat server; see `ask`. Close it, or use it in a `with` statement."""

    def __init__(
        self, server: ChatServer, journal: epath.PathLike, backoff: Backoff | None = None
    ) -> None:
        """Opens the journal; nothing is sent yet.

        Args:
          server: which to ask.
          journal: folder of what was answered, which a later run reads.
          backoff: waits between tries.

        Raises:
          MmpoError: the key is missing, or the journal cannot be used, see `Journal`.
        """
        self.server = server
        self._connection = Connection(server)
        self._journal = Journal(journal)
        self._tally = Tally()
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="chat-images")
        self._asker = Asker(
            server, self._connection, backoff or Backoff(), self._tally, self._encoders
        )
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        """By key: all that are waited for; under the lock."""
        self._waiting: collections.deque[_Job] = collections.deque()
        """Those that were not begun, in order. This and what follows belongs to the loop."""
        self._running = 0
        self._given_up = 0
        """Requests in a row without a reply."""
        self._proven = len(self._journal) > 0
        """Whether the server ever took a request."""
        self._bad: list[tuple[str, ChatFailure]] = []
        """Bad requests so far, while the server has not taken any."""
        self._rejected: set[str] = set()
        """Keys of what was answered and of no use; under the lock."""
        self._unseen: set[str] = set()
        """Keys of what was answered and nobody was given, so far; under the lock."""
        self._closed = False
        self._gone: Exception | None = None
        """Why the server is not asked any more; under the lock."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="chat", daemon=True)
        self._thread.start()

    # What callers use ---------------------------------------------------------------------------

    def ask(self, requests: Sequence[ChatRequest]) -> list[Outcome]:
        """The reply to every request, or why it has none; in order.

        Requests are sent in order, as many at a time as the server takes. What is in the journal,
        or under way for another thread, is not sent. Each outcome counts as progress of the
        innermost activity (`core.progress`).

        Raises:
          MmpoError: no request can succeed (key, model, address, account), or the server is out
            of reach or gives no replies for too long. What was answered is in the journal.
          OSError: the journal cannot be written, as on a full disk.
        """
        mine: dict[str, _Job] = {}
        try:
            places = [self._begin(request, mine) for request in requests]
            uses = collections.Counter(p.key for p in places if isinstance(p, _Job))
            progress.advance(len(places) - uses.total())
            jobs = {job.future: job for job in mine.values()}
            for future in concurrent.futures.as_completed(jobs):
                future.result()
                progress.advance(uses[jobs[future].key])
        except BaseException:
            self._abandon(mine.values())
            raise
        with self._lock:
            self._unseen.difference_update(mine)
        return [place.future.result() if isinstance(place, _Job) else place for place in places]

    def reject(self, requests: Sequence[ChatRequest]) -> None:
        """Notes that what these requests were answered is of no use, see `forget_rejected`."""
        for request in requests:
            with contextlib.suppress(DataError):  # an image that cannot be read was not sent
                key = request.key(self.server)
                with self._lock:
                    self._rejected.add(key)

    def forget_rejected(self) -> None:
        """Takes what was of no use out of the journal, so that the server, once it is mended, is
        asked again; also what came for calls of `ask` that gave nothing, as nobody has looked at
        it. Once `end` was called no more comes.

        Raises:
          OSError: the journal cannot be written.
        """
        with self._lock:
            for key in self._rejected | self._unseen:
                self._journal.forget(key)

    def check(self) -> None:
        """Looks whether the server is there and has the model, before anything heavy is done.

        One that has no list of its models is asked for a word, and warned of; where there is no
        such address, `url` is wrong.

        Raises:
          MmpoError: the server cannot be reached, does not let us in, or has other models.
        """
        asyncio.run_coroutine_threadsafe(self._check(), self._loop).result()

    def is_up(self) -> bool:
        """Whether the server answers now, and with more than that it cannot yet."""
        looking = availability.is_up(self._connection)
        return asyncio.run_coroutine_threadsafe(looking, self._loop).result()

    def stop(self, error: MmpoError) -> None:
        """Ends all that is asked, now and later, with an error: the server is gone for good."""
        with self._lock:
            self._gone = error
        self._loop.call_soon_threadsafe(self._stop, error)

    @property
    def counts(self) -> ChatCounts:
        """What was done so far."""
        with self._lock:
            return self._tally.counts(self._asker.left_out, self._loop.time())

    def end(self) -> None:
        """Ends what is under way, without waiting for answers. Who still asks gets an error."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            closing = asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)
            with contextlib.suppress(TimeoutError):
                closing.result(CLOSING_SECONDS)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSING_SECONDS)
            self._encoders.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Ends what is under way, see `end`, and lets go of the journal."""
        try:
            self.end()
        finally:
            self._journal.close()

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # In the threads of callers ------------------------------------------------------------------

    def _begin(self, request: ChatRequest, mine: dict[str, _Job]) -> _Job | Outcome:
        """The outcome of a request where it is known, or the job that it now is or was already.

        Args:
          mine: key -> job of this call of `ask`; added to.
        """
        try:
            key = request.key(self.server)
        except DataError as error:
            failure = ChatFailure("unreadable_image", str(error))
            with self._lock:
                self._tally.ended(failure)
            return failure
        if key in mine:
            return mine[key]
        with self._lock:
            if self._closed:
                raise RuntimeError("the chat client is closed")
            if self._gone is not None:
                raise self._gone
            job = self._jobs.get(key)
            if job is not None:
                job.waiters += 1
                mine[key] = job
                return job
            known = self._journal.read(key)
            if known is not None:
                if self._journal.found(key):
                    self._tally.known.add(key)
                return known
            job = self._jobs[key] = mine[key] = _Job(key, request)
            self._loop.call_soon_threadsafe(self._enqueue, job)
        return job

    def _abandon(self, jobs: Iterable[_Job]) -> None:
        """One waits less for these jobs."""
        dropped = []
        with self._lock:
            for job in jobs:
                job.waiters -= 1
                if not job.waiters and self._jobs.get(job.key) is job:
                    del self._jobs[job.key]
                    dropped.append(job)
            if not self._closed:
                self._loop.call_soon_threadsafe(self._drop, dropped)

    # In the loop --------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _enqueue(self, job: _Job) -> None:
        self._waiting.append(job)
        self._fill()

    def _drop(self, jobs: Sequence[_Job]) -> None:
        """What nobody waits for any more."""
        for job in jobs:
            if job.task is not None:
                job.task.cancel()
        gone = set(jobs)
        self._waiting = collections.deque(job for job in self._waiting if job not in gone)
        self._fill()

    def _fill(self) -> None:
        """Begins what waits; how many of it are sent together is up to the asker."""
        while self._waiting and self._running < self.server.max_concurrent:
            job = self._waiting.popleft()
            self._running += 1
            job.task = self._loop.create_task(self._work(job))
        with self._lock:
            self._tally.busy(bool(self._running or self._waiting), self._loop.time())

    async def _work(self, job: _Job) -> None:
        """Asks for one job; what goes wrong for all of them ends all."""
        try:
            outcome = await self._answer(job.request)
            self._settle(job, outcome)
            if self._given_up >= GIVEN_UP and isinstance(outcome, ChatFailure):
                await self._look_for_life(outcome)
        except MmpoError as error:
            self._stop(MmpoError(f"{error}; {KEPT}"))
        except Exception as error:  # else those who ask would wait for ever
            self._stop(error)
        finally:
            self._running -= 1
            self._fill()

    async def _answer(self, request: ChatRequest) -> Outcome:
        """See `Asker.answer`; what that raises is counted."""
        try:
            return await self._asker.answer(request)
        except MmpoError:
            with self._lock:
                self._tally.stopped()
            raise

    def _settle(self, job: _Job, outcome: Outcome) -> None:
        """Keeps an outcome, and hands it to those who wait."""
        self._judge(job.key, outcome)
        with self._lock:
            self._tally.ended(outcome)
            self._unseen.add(job.key)
            if self._jobs.get(job.key) is job:
                del self._jobs[job.key]
        if not job.future.done():
            job.future.set_result(outcome)

    def _judge(self, key: str, outcome: Outcome) -> None:
        """Writes an outcome to the journal, unless it may be another the next time.

        Where a server has never taken a request, "bad request" may mean all of them: the server
        takes no images, say. Then it is not kept before one is taken, or the client closes.
        """
        if isinstance(outcome, ChatReply):
            self._given_up, self._proven = 0, True
            self._write_bad()
        elif outcome.reason in PASSING:
            self._given_up += 1
            return
        elif outcome.reason not in PERMANENT:
            return
        elif outcome.reason == "bad_request" and not self._proven:
            self._bad.append((key, outcome))
            if len(self._bad) >= GIVEN_UP:
                self._bad.clear()
                raise MmpoError(
                    f"{self.server.url}, model {self.server.model}: the server takes none of the "
                    f"first {GIVEN_UP} requests; the last: {outcome.detail}"
                )
            return
        self._journal.write(key, outcome)

    def _write_bad(self) -> None:
        for key, failure in self._bad:
            if key not in self._rejected:
                self._journal.write(key, failure)
        self._bad.clear()

    async def _look_for_life(self, failure: ChatFailure) -> None:
        """Asks for one word, after many requests in a row without a reply: their fault, or the
        server's?

        Raises:
          MmpoError: that has no reply either.
        """
        self._given_up = 0
        outcome = await self._asker.answer(availability.PROBE)
        if isinstance(outcome, ChatFailure):
            raise MmpoError(
                f"{self.server.url}, model {self.server.model}: {GIVEN_UP} requests in a row had "
                f"no reply after all retries; the last: {failure.reason}, {failure.detail}"
            )

    def _stop(self, error: Exception) -> None:
        """Ends all jobs with an error. Who asks later asks anew."""
        with self._lock:
            jobs = list(self._jobs.values())
            self._jobs.clear()
        self._waiting.clear()
        for job in jobs:
            if job.task is not None and job.task is not asyncio.current_task(self._loop):
                job.task.cancel()
            if not job.future.done():
                job.future.set_exception(error)

    async def _check(self) -> None:
        left_out = frozenset(self._asker.left_out)
        await availability.check(self.server, self._connection, left_out, self._proven)

    async def _shut_down(self) -> None:
        self._write_bad()
        self._stop(RuntimeError("the chat client was closed"))
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connection.close()
