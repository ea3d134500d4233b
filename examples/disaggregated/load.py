"""Many requests at once, some of which are given up, compared with what must come."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import aiohttp
import corpus
import fleet
import served_model


@dataclasses.dataclass
class Report:
    """How the requests of a load ended.

    Attributes:
      right: answers that are equal to one-process decoding, token for token.
      wrong: those that are not.
      cancelled: given up on purpose, after some tokens that were right.
      failed: why others did not get an answer.
    """

    right: int = 0
    wrong: int = 0
    cancelled: int = 0
    failed: list[fleet.AnswerError] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.right} answers equal to one-process decoding"]
        parts += [f"{self.wrong} wrong"] if self.wrong else []
        parts += [f"{self.cancelled} cancelled"] if self.cancelled else []
        parts += [f"{len(self.failed)} failed: {self.failed[0]}"] if self.failed else []
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts and their answers by one-process decoding."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]

    @classmethod
    def make(
        cls, sizes: str, file: pathlib.Path, *, count: int, made: int
    ) -> Questions:
        """``count`` pieces of text, of 5 to 100 tokens, and ``made`` tokens each.

        Kept beside the weights: where those were brought to, so are the answers.
        """
        kept = file.with_suffix(f".{count}x{made}.json")
        if kept.exists() and kept.stat().st_mtime >= file.stat().st_mtime:
            return cls(**json.loads(kept.read_text()))
        import one_process  # and with it what trains the model

        text = corpus.text()
        prompts = [
            text[997 * i : 997 * i + 5 + 95 * i // max(1, count - 1)].tolist()
            for i in range(count)
        ]
        arrays = served_model.load(file)
        answers = one_process.decode(sizes, arrays, prompts, made)
        kept.write_text(json.dumps({"prompts": prompts, "answers": answers}))
        return cls(prompts, answers)


async def run(
    running: fleet.Fleet,
    questions: Questions,
    *,
    requests: int,
    cancel_every: int = 0,
    **fields: Any,
) -> Report:
    """Asks so many at the same time; every so many-th is given up in its middle."""
    report = Report()
    made = len(questions.answers[0])

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        which = number % len(questions.prompts)
        wanted = list(questions.answers[which])
        stop = made
        if cancel_every and number % cancel_every == 0:
            turn = number // cancel_every
            stop = 0 if turn % 2 else 1 + turn % (made - 1)  # 0: before the first token
        got: list[int] = []
        stream = running.stream(
            session, questions.prompts[which], max_tokens=made, **fields
        )
        async with contextlib.aclosing(stream) as pieces:
            if stop == 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(anext(pieces), 0.04 * (1 + turn))
            else:
                async for tokens in pieces:
                    got += tokens
                    if len(got) >= stop < made:
                        break
        if got != wanted[: len(got)] or (stop == made and got != wanted):
            report.wrong += 1
        elif stop < made:
            report.cancelled += 1
        else:
            report.right += 1

    async def counted(session: aiohttp.ClientSession, number: int) -> None:
        try:
            await one(session, number)
        except fleet.AnswerError as error:
            report.failed.append(error)

    connector = aiohttp.TCPConnector(limit=requests)
    # The router ends each request at its limit; a session's own is five minutes.
    limit = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=limit) as session:
        await asyncio.gather(*(counted(session, number) for number in range(requests)))
    return report
