"""One rank of a test cluster: a pytest session that runs what it is told to.

Started by `_cluster.py` with a socket. The session collects a test's file when it is
first needed and keeps it, so that a test costs milliseconds once its file is known.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from jaxfabric._cli import _processes

# Options of the outer run that must not act in a rank as well.
_OUTER_OPTIONS = {
    "keyword": "",
    "markexpr": "",
    "maxfail": 0,
    "deselect": None,
    "xmlpath": None,
    "usepdb": False,
    "trace": False,
    "cacheclear": False,
    "collectonly": False,
    "durations": None,
    "lf": False,
    "failedfirst": False,
    "stepwise": False,
    "capture": "no",  # the rank's output goes to its log, whatever becomes of it
    "runxfail": True,  # the outer run judges expected failures
    "numprocesses": None,
    "dist": "no",
    "tx": [],
    "looponfail": False,
    "setuponly": False,
    "setupshow": False,
    "no_cov": True,
}


class _Session:
    """The plugin that drives the rank's pytest session."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._items: dict[str, pytest.Item] = {}
        self._collected: set[str] = set()
        self._errors: list[str] = []
        self._announced: str | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool:
        session.items = []
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for message in self._channel.messages():
            self._run(session, message["nodeid"], message["next"])
            self._channel.send(kind="done")
        return True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._errors.append(str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        longrepr = report.longrepr
        reason = longrepr[2] if isinstance(longrepr, tuple) else ""
        crash = getattr(longrepr, "reprcrash", None)
        self._channel.send(
            kind="report",
            when=report.when,
            outcome=report.outcome,
            reason=str(reason).removeprefix("Skipped: "),
            summary=getattr(crash, "message", "").split("\n")[0],
            text=report.longreprtext if report.failed else "",
            sections=report.sections if report.failed else [],
        )

    def _run(self, session: pytest.Session, nodeid: str, following: str | None) -> None:
        item = self._find(session, nodeid)
        if item is None:
            self._channel.send(
                kind="report",
                when="collect",
                outcome="failed",
                reason="",
                summary=f"the rank found no test {nodeid}",
                text="\n".join(self._errors)
                or f"The rank collected the file and found no test {nodeid}: names "
                "and parameters of tests must be the same in every process.",
                sections=[],
            )
            return
        if self._announced not in (None, nodeid):
            # The test whose fixtures were kept was skipped by the outer run.
            session._setupstate.teardown_exact(item)
        next_item = None if following is None else self._find(session, following)
        self._announced = None if next_item is None else following
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)

    def _find(self, session: pytest.Session, nodeid: str) -> pytest.Item | None:
        path = nodeid.partition("::")[0]
        if path not in self._collected:
            self._collected.add(path)
            self._errors = []
            full = str(session.config.rootpath / path)
            for item in session.perform_collect([full], genitems=True):
                self._items[item.nodeid] = item
        return self._items.get(nodeid)


class Channel:
    """Messages to and from the outer run: one JSON object a line."""

    def __init__(self, fd: int) -> None:
        self._reader = os.fdopen(fd, "rb")
        self._fd = fd
        self._stopped = False

    def send(self, **message: Any) -> None:
        """Sends one message; it may wait until the outer run has read."""
        _write_all(self._fd, json.dumps(message).encode() + b"\n")

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yields messages until `{"stop": true}`; ends the process at the end."""
        for line in self._reader:
            message = json.loads(line)
            if message.get("stop"):
                self._stopped = True
                return
            yield message
        os._exit(1)  # the outer run is gone; nobody waits for a clean end

    def first(self) -> dict[str, Any]:
        """The first message."""
        return next(self.messages())

    def leave(self) -> None:
        """Ends the process, without JAX's shutdown barrier, which may take minutes.

        After a stop it waits for the outer run's SIGKILL: rank 0 must not go first,
        since JAX aborts processes whose coordinator is gone. Otherwise something went
        wrong, and the outer run must see the end at once.
        """
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        if not self._stopped:
            os._exit(1)
        self.send(kind="bye")
        for _ in self.messages():
            pass


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _initialize_jax(setup: dict[str, Any]) -> None:
    import jax

    jax.distributed.initialize(
        setup["coordinator"],
        setup["processes"],
        setup["rank"],
        cluster_detection_method="deactivate",
        initialization_timeout=setup["start_timeout_s"],
        heartbeat_timeout_seconds=setup["heartbeat_s"],
        **setup["initialize_kwargs"],
    )
    jax.devices()  # the backends of all ranks meet now, not in the first test


def _run_session(setup: dict[str, Any], channel: Channel) -> None:
    from _pytest.config import Config

    options = {**setup["options"], **_OUTER_OPTIONS}
    options["basetemp"] = setup["basetemp"]
    options["jaxfabric_worker"] = True
    off = ("terminal", "cacheprovider", "faulthandler", "junitxml", "pastebin")
    options["plugins"] = [*options.get("plugins", []), *(f"no:{p}" for p in off)]
    # What pytest-xdist uses as well: a config with the options of another process.
    # This module's package is a plugin that pytest would like to see first.
    quiet = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    config = Config.fromdictargs(options, [*quiet, *setup["args"]])
    config.pluginmanager.register(_Session(channel), "jaxfabric-rank")
    channel.send(kind="ready")
    config.hook.pytest_cmdline_main(config=config)


def main() -> None:
    """Runs the rank that the messages on file descriptor argv[1] describe."""
    fd, parent_pid, stacks_path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    os.set_inheritable(fd, False)
    _processes.die_with_parent(parent_pid)
    stacks = open(stacks_path, "a")  # until the process ends
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    channel = Channel(fd)
    setup = channel.first()
    sys.path += [p for p in setup["sys_path"] if p not in sys.path]
    import jax  # noqa: F401  (its atexit functions must be older than ours)

    atexit.register(channel.leave)
    _initialize_jax(setup)
    _run_session(setup, channel)


if __name__ == "__main__":
    main()
