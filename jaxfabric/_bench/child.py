"""A child: one end of a subject, which does what its parent's lines ask.

A request is an object in one line on stdin, the answer one on stdout. What a
library prints goes to stderr. The child ends when stdin does.
"""

from __future__ import annotations

import collections
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
from typing import Any

from .case import Case, Effort
from .ends import Initiator, Target

PR_SET_PDEATHSIG = 1


def main() -> None:
    """`start_child.py ROLE SUBJECT BYTES OPTIONS`; ends the process."""
    role, subject, bytes_, options = sys.argv[1:]
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        ends = importlib.import_module(f".ends.{subject}", __package__)
        end = getattr(ends, role)(int(bytes_), json.loads(options))
        serve = serve_target if role == "Target" else serve_initiator
        answer: dict[str, Any] = {}
    except ImportError as error:
        answer = {"missing": str(error)}
    except Exception as error:
        answer = {"error": describe(error)}
    print(json.dumps(answer), file=answers, flush=True)
    if not answer:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = serve(end, request)
            except Exception as error:
                answer = {"error": describe(error)}
            print(json.dumps(answer), file=answers, flush=True)
        end.close()
    # Some libraries hang or crash when they are taken apart.
    sys.stderr.flush()
    os._exit(0)


def die_with_parent() -> None:
    """The kernel kills this process when the parent ends, however it does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def describe(error: Exception) -> str:
    """One line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def serve_target(end: Target, request: dict[str, Any]) -> dict[str, Any]:
    """Answers one request to a target."""
    if request["do"] == "card":
        return {"card": end.card()}
    case, peer = Case(**request["case"]), request["peer"]
    if request["do"] == "check":
        end.wait(request["operations"])
        return {"wrong_bytes": case.wrong_bytes(end.memory, peer)}
    end.memory[: case.bytes_] = 0
    end.prepare(case, peer)
    return {}


def serve_initiator(end: Initiator, request: dict[str, Any]) -> dict[str, Any]:
    """Answers one request to an initiator."""
    if request["do"] == "connect":
        end.connect(request["cards"])
        return {"versions": end.versions()}
    case = Case(**request["case"])
    end.memory[: case.bytes_] = case.pattern()
    end.prepare(case)
    effort = Effort(**request["effort"])
    warm_up = case.window  # each slot once
    for number in range(warm_up):
        end.write(number % case.window)
    # As timeit: collections take longer the more a library has loaded.
    gc.collect()
    gc.disable()
    try:
        latency_s = time_alone(end, case, effort)
        operations, seconds = time_in_flight(end, case, effort)
    finally:
        gc.enable()
    return {
        "measurement": {
            "latency_s": latency_s,
            "operations": operations,
            "seconds": seconds,
        },
        "all_operations": warm_up + len(latency_s) + operations,
    }


def time_alone(end: Initiator, case: Case, effort: Effort) -> list[float]:
    """Seconds of each operation; the next begins when the last is done."""
    found: list[float] = []
    last = time.perf_counter()
    until = last + effort.seconds
    while len(found) < effort.least or (last < until and len(found) < effort.most):
        begin = time.perf_counter()
        end.write(len(found) % case.window)
        last = time.perf_counter()
        found.append(last - begin)
    return found


def time_in_flight(end: Initiator, case: Case, effort: Effort) -> tuple[int, float]:
    """How many operations, `case.window` in flight, took how many seconds."""
    flying: collections.deque[Any] = collections.deque()
    start, finish, window = end.begin, end.finish, case.window
    begun = 0
    begin = time.perf_counter()
    until = begin + effort.seconds
    while begun < effort.least or (begun < effort.most and time.perf_counter() < until):
        if len(flying) == window:
            finish(flying.popleft())
        flying.append(start(begun % window))
        begun += 1
    while flying:
        finish(flying.popleft())
    return begun, time.perf_counter() - begin
