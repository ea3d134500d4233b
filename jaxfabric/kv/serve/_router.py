"""Router: takes prompts, and sees each through prefill and decode to its last token."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from jaxfabric.kv.serve import _messages
from jaxfabric.kv.serve._jobs import Attempt, Job, Jobs
from jaxfabric.kv.serve._metrics import Metrics
from jaxfabric.kv.serve._prompt import Prompt, RequestError

_log = logging.getLogger(__name__)
_EVENTS_MAX = 1 << 16  # of one request, that its client has not taken yet
_RETRY_S = 0.05  # before the second try; twice as long before each that follows
_RETRY_AFTER_S = 1  # what clients are told that find no room


class _AttemptError(Exception):
    """One try failed; another one may do better."""

    def __init__(self, job: Job, why: str, lost: bool, again: bool) -> None:
        super().__init__(f"{job.role} job {job.name}: {why}")
        self.job, self.lost, self.again = job, lost, again


@dataclasses.dataclass
class _Progress:
    """How far a request has come, over all tries."""

    until: float
    begin: float
    made: list[int] = dataclasses.field(default_factory=list)
    failures: list[_AttemptError] = dataclasses.field(default_factory=list)
    over: bool = False


class Router:
    """Chooses a prefill and a decode job for each prompt, and streams the answer.

    It runs in one asyncio loop. A job that is lost takes nothing with it but time: its
    requests go to others, with the tokens that were made already, until ``attempts``
    are used up or the time limit is reached. Answers stay the same only if the jobs
    decode greedily, or draw from what is in the tokens.

    Args:
      waiting: so many requests may wait for a place; more are refused (``"full"``).
      timeout_s: of a request that says nothing else.
      attempts: how often a request is tried.

    Attributes:
      jobs: those that are connected.
      metrics: for Prometheus.

    Example::

      router = Router()
      app = create_app(router, token="secret")        # for aiohttp.web
      async for tokens in router.generate(Prompt([84, 104, 101], max_tokens=16)):
          print(tokens)
    """

    def __init__(
        self, *, waiting: int = 256, timeout_s: float = 60.0, attempts: int = 4
    ) -> None:
        if waiting < 0 or attempts < 1 or not timeout_s > 0:
            raise ValueError(
                f"Router: waiting={waiting} must be 0 or more, attempts={attempts} 1 "
                f"or more, timeout_s={timeout_s} above 0"
            )
        self.waiting, self.timeout_s, self.attempts = waiting, timeout_s, attempts
        self.jobs = Jobs()
        self.metrics = Metrics(self.jobs)
        self._backing_off = 0

    # --- Jobs ---

    def add_job(self, job: Job) -> None:
        """A job said hello.

        Raises:
          NameTakenError: another one has its name.
        """
        self.jobs.add(job)

    def remove_job(self, job: Job) -> None:
        """A job is lost, or took leave."""
        if self.jobs.remove(job):
            self.metrics.jobs_gone.labels(job.role).inc()

    def on_message(self, job: Job, kind: str, fields: dict[str, Any]) -> None:
        """What a job says; what it says about requests it does not have is dropped."""
        if kind == "leaving":
            job.leaving = True
        elif kind == "state":
            job.addresses, job.numbers = fields["addresses"], fields["numbers"]
        elif kind == "tokens":
            for request, tokens in fields["items"]:
                if request not in job.attempts:
                    continue
                events = job.attempts[request].events
                if events.qsize() >= _EVENTS_MAX:
                    job.close("it makes more tokens than anybody asked for")
                    return
                events.put_nowait(("tokens", job, tokens))
        elif fields["request"] in job.attempts:
            attempt = job.attempts[fields["request"]]
            self.jobs.end(attempt, job)
            attempt.events.put_nowait((kind, job, fields))

    # --- Requests ---

    async def generate(self, prompt: Prompt) -> AsyncGenerator[list[int], None]:
        """The tokens of an answer, as they come; closing it cancels the request.

        Raises:
          RequestError: why there is no answer, or no more of it.
        """
        begin = time.monotonic()
        limit_s = self.timeout_s if prompt.timeout_s is None else prompt.timeout_s
        now = asyncio.get_running_loop().time()
        progress = _Progress(now + limit_s, begin)
        outcome = "cancelled"
        self.metrics.in_flight.inc()
        try:
            self._admit()
            async with contextlib.aclosing(self._tries(prompt, progress)) as pieces:
                async for tokens in pieces:
                    if not progress.made:
                        self.metrics.ttft.observe(time.monotonic() - begin)
                    progress.made += tokens
                    self.metrics.tokens.inc(len(tokens))
                    yield tokens
            outcome = "finished"
        except RequestError as error:
            outcome = error.reason
            raise
        except Exception as error:
            outcome = "failed"
            _log.exception("router: a request failed unexpectedly")
            raise RequestError("failed", f"the router failed: {error}") from error
        finally:
            self.metrics.in_flight.dec()
            self.metrics.duration.observe(time.monotonic() - begin)
            self.metrics.requests.labels(outcome).inc()

    def _admit(self) -> None:
        if missing := self.jobs.missing_roles():
            raise RequestError(
                "no_jobs", f"no {' and no '.join(missing)} job is here", _RETRY_AFTER_S
            )
        if self.jobs.waiting + self._backing_off >= self.waiting and not self._room():
            raise RequestError(
                "full",
                f"{self.jobs.waiting} requests wait for a place already",
                _RETRY_AFTER_S,
            )

    def _room(self) -> bool:
        return self.jobs.waiting == 0 and all(
            any(job.free > 0 for job in self.jobs.of(role)) for role in _messages.ROLES
        )

    async def _tries(
        self, prompt: Prompt, progress: _Progress
    ) -> AsyncGenerator[list[int], None]:
        for number in range(self.attempts):
            try:
                if number:
                    self._backing_off += 1
                    try:
                        async with asyncio.timeout_at(progress.until):
                            await asyncio.sleep(_RETRY_S * 2**number)
                    finally:
                        self._backing_off -= 1
                one = self._try_once(prompt, progress)
                async with contextlib.aclosing(one) as pieces:
                    async for tokens in pieces:
                        yield tokens
                return
            except _AttemptError as failure:
                kind = "lost" if failure.lost else "failed"
                self.metrics.attempts_failed.labels(failure.job.role, kind).inc()
                progress.failures.append(failure)
                if len(progress.made) == prompt.max_tokens:
                    return  # it was lost between the last token and its end
                if not failure.again:
                    raise RequestError("failed", str(failure)) from None
            except TimeoutError:
                raise self._out_of_time(progress) from None
        raise RequestError(
            "jobs_lost" if progress.failures[-1].lost else "failed",
            f"{self.attempts} tries failed, the last one at {progress.failures[-1]}",
            _RETRY_AFTER_S,
        )

    def _out_of_time(self, progress: _Progress) -> RequestError:
        took_s = time.monotonic() - progress.begin
        parts = [f"{len(progress.made)} tokens were made in {took_s:.1f} s"]
        if missing := self.jobs.missing_roles():
            parts.append(f"no {' and no '.join(missing)} job is here")
        parts += [str(failure) for failure in progress.failures[-1:]]
        return RequestError("deadline", "; ".join(parts), _RETRY_AFTER_S)

    async def _try_once(
        self, prompt: Prompt, progress: _Progress
    ) -> AsyncGenerator[list[int], None]:
        """One try, which goes on behind the tokens that were made before.

        Raises:
          _AttemptError: a job failed, or was lost.
          TimeoutError: the request's time is over.
        """
        loop = asyncio.get_running_loop()
        avoid = [failure.job for failure in progress.failures]
        async with asyncio.timeout_at(progress.until):
            attempt = await self.jobs.take(avoid, lambda: secrets.randbits(64))
        try:
            fields = {
                "request": attempt.id,
                "tokens": prompt.tokens + progress.made,
                "max_tokens": prompt.max_tokens - len(progress.made),
                "timeout_s": max(1e-3, progress.until - loop.time()),
                "options": prompt.options,
            }
            attempt.decode.send("expect", fields)
            attempt.prefill.send(
                "prefill", {**fields, "addresses": attempt.decode.addresses}
            )
            while not progress.over:
                async with asyncio.timeout_at(progress.until):
                    event = await attempt.events.get()
                tokens = self._hear(attempt, progress, prompt, *event)
                if tokens:
                    yield tokens
        finally:
            for job in (attempt.prefill, attempt.decode):
                if self.jobs.end(attempt, job):
                    job.send("cancel", {"request": attempt.id})

    def _hear(
        self,
        attempt: Attempt,
        progress: _Progress,
        prompt: Prompt,
        kind: str,
        job: Job,
        value: Any,
    ) -> list[int]:
        """New tokens, if an event brings some."""
        if kind == "tokens":
            room = prompt.max_tokens - len(progress.made)
            return list(value[:room])
        if kind == "lost":
            raise _AttemptError(job, "lost", lost=True, again=True)
        if kind == "failed":
            raise _AttemptError(job, value["why"], lost=False, again=value["again"])
        progress.over = kind == "finished"
        return []
