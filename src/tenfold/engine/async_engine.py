"""One model that serves many requests at once: a thread steps it, and an event loop hears of what it made."""

import asyncio
import atexit
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable

from tenfold.engine.batch import BatchRunner
from tenfold.engine.request import Load, Meter, ModelFacts, Overloaded, Piece, Request, Stopped
from tenfold.engine.scheduler import Scheduler
from tenfold.engine.sequence import Job
from tenfold.errors import TenfoldError
from tenfold.memory import resident_bytes
from tenfold.tokenizer import Tokenizer

_CLOSE_POLL = 0.02


class StreamedAnswer:
    """An `Answer`: pieces come in from the engine's thread and go out in an event loop."""

    def __init__(self, job: Job, cancel: Callable[[Job], None]):
        self._job, self._cancel = job, cancel
        self._lock = threading.Lock()
        self._news: deque[Piece | TenfoldError] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: asyncio.Event | None = None

    @property
    def meter(self) -> Meter:
        return self._job.meter

    def tell(self, news: Piece | TenfoldError) -> None:
        """From the engine's thread."""
        with self._lock:
            self._news.append(news)
            if self._loop is None or self._arrived is None or self._loop.is_closed():
                return
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        with self._lock:
            self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
            self._arrived.set()
        unfinished = self._job.request.n
        try:
            while unfinished:
                await self._arrived.wait()
                self._arrived.clear()
                while self._news:
                    news = self._news.popleft()
                    if isinstance(news, TenfoldError):
                        raise news
                    unfinished -= news.finish_reason is not None
                    yield news
        finally:
            if unfinished:
                self._cancel(self._job)

    async def aclose(self) -> None:
        self._cancel(self._job)


class AsyncLLM:
    """An `AsyncEngine`. Its thread runs from the start until `close`."""

    def __init__(
        self,
        runner: BatchRunner,
        tokenizer: Tokenizer,
        name: str,
        context: int,
        max_sequences: int = 16,
        max_queue: int = 128,
        memory_bytes: int | None = None,
    ):
        """`max_queue` requests may wait besides those that run."""
        self.tokenizer, self._max_queue = tokenizer, max_queue
        self._scheduler = Scheduler(runner, tokenizer, context, max_sequences)
        self.facts = _facts(runner, name, self._scheduler.context, memory_bytes)
        self._answers: dict[Job, StreamedAnswer] = {}
        self._inbox: deque[tuple[Callable[[Job], None], Job]] = deque()
        self._wake = threading.Condition()
        self._closed: str | None = None
        """Why no more requests are taken."""
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="tenfold-engine", daemon=True)
        self._thread.start()
        atexit.register(self._end)  # a thread that Python finds in the kernels when it ends would crash it

    @property
    def stopped(self) -> str | None:
        return self._closed

    def submit(self, request: Request) -> StreamedAnswer:
        """As `AsyncEngine`; from any thread."""
        job = self._scheduler.prepare(request)
        answer = StreamedAnswer(job, self._cancel)
        with self._wake:
            if self._closed is not None:
                raise Stopped(self._closed)
            if self._waiting() >= self._max_queue:
                raise Overloaded(f"{self._max_queue} requests are waiting already: try again later")
            self._answers[job] = answer
            self._inbox.append((self._scheduler.add, job))
            self._wake.notify()
        return answer

    def _waiting(self) -> int:
        """Requests of which no text runs yet."""
        new = [seq for seq in list(self._scheduler.waiting) if seq.index == 0 and not seq.generated]
        return len(self._inbox) + len(new)

    def _cancel(self, job: Job) -> None:
        with self._wake:
            self._inbox.append((self._scheduler.cancel, job))
            self._wake.notify()

    def load(self) -> Load:
        scheduler = self._scheduler
        return Load(
            running=len(scheduler.active),
            waiting=self._waiting(),
            kv_blocks=scheduler.blocks.count,
            kv_blocks_used=scheduler.blocks.used,
            memory_bytes=resident_bytes(),
            steps=scheduler.steps,
            step_tokens=scheduler.step_tokens,
            preemptions=scheduler.preemptions,
            hits=round(scheduler.hits),
            misses=round(scheduler.misses),
            disk_bytes=round(scheduler.disk_bytes),
        )

    async def close(self, grace: float) -> None:
        self._closed = self._closed or "the server is shutting down: it takes no more requests"
        end = asyncio.get_running_loop().time() + grace
        while self._answers and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_CLOSE_POLL)
        await asyncio.to_thread(self._end)
        atexit.unregister(self._end)

    def _end(self) -> None:
        with self._wake:
            self._stop = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop:
                self._take_in()
                self._tell()
            for job in list(self._answers):
                self._scheduler.cancel(job)
            self._tell()
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            with self._wake:
                self._closed = f"the engine stopped: {type(error).__name__}: {error}"
                for answer in self._answers.values():
                    answer.tell(Stopped(self._closed))
                self._answers.clear()

    def _take_in(self) -> None:
        with self._wake:
            while not (self._inbox or self._scheduler.busy or self._stop):
                self._wake.wait()
        while self._inbox:
            what, job = self._inbox.popleft()
            what(job)

    def _tell(self) -> None:
        told = self._scheduler.step()
        for job, news in told:
            if (answer := self._answers.get(job)) is not None:
                answer.tell(news)
        for job, _ in told:  # not before: several texts of one may end in one step
            if not job.unfinished:
                self._answers.pop(job, None)


def _facts(runner: BatchRunner, name: str, context: int, memory_bytes: int | None) -> ModelFacts:
    config = runner.config
    return ModelFacts(
        name=name,
        context=context,
        vocab_size=config.vocab_size,
        num_params=config.num_params(),
        num_active_params=config.num_active_params(),
        num_layers=config.num_hidden_layers,
        sparse_layers=config.sparse_layers,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        memory_bytes=memory_bytes,
    )
