"""The pytest plugin: `@pytest.mark.jaxfabric(processes=4)`.

The outer pytest process collects, selects and reports as always. For a marked test it
does not run the body: the ranks of a cluster do, with their own fixtures and
parameters, and their outcomes become the test's. This module does not import jax.
"""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest

from jaxfabric._cli import _processes
from jaxfabric.testing import _hosts, _mark, _outcome
from jaxfabric.testing._cluster import Cluster, ClusterError
from jaxfabric.testing._pool import Pool
from jaxfabric.testing._rank import Layout

__all__ = ["RanksFailed", "pytest_addoption", "pytest_configure"]

_MARK = "jaxfabric"
_DEFAULT_TIMEOUT_S = "120"
_DEFAULT_GRACE_S = "10"
_HELP = (
    "jaxfabric(processes=1, devices_per_process=1, timeout_s=None, fresh=False, "
    "lost=()): run the test's body on every rank of a cluster of `processes` JAX "
    "processes. fresh: on a cluster of its own. lost: ranks that may die in it."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the plugin's options."""
    group = parser.getgroup("jaxfabric", "tests on several ranks (jaxfabric)")
    group.addoption(
        "--jaxfabric-timeout-s",
        type=float,
        metavar="S",
        help="seconds a test without timeout_s may take; then all ranks' stacks are "
        "shown and it fails",
    )
    group.addoption(
        "--jaxfabric-coordinator",
        metavar="HOST:PORT",
        help="run the marked tests jointly on several hosts, where host 0 listens at "
        "this address; `slurm` and `auto` take it from Slurm",
    )
    group.addoption(
        "--jaxfabric-process-id",
        type=int,
        metavar="I",
        help="this host's number (default: SLURM_PROCID)",
    )
    group.addoption(
        "--jaxfabric-num-processes",
        type=int,
        metavar="N",
        help="how many hosts, one pytest on each (default: SLURM_NTASKS)",
    )
    group.addoption(
        "--jaxfabric-job",
        metavar="TEXT",
        help="a string that only hosts of this run know (default: JAXFABRIC_JOB, "
        "SLURM_JOB_ID)",
    )
    parser.addini(
        "jaxfabric_timeout_s", "see --jaxfabric-timeout-s", default=_DEFAULT_TIMEOUT_S
    )
    parser.addini(
        "jaxfabric_grace_s",
        "seconds that the other ranks of a test get once one has failed",
        default=_DEFAULT_GRACE_S,
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the mark and, outside of the ranks, what runs marked tests."""
    config.addinivalue_line("markers", _HELP)
    if getattr(config.option, "jaxfabric_worker", False):
        return  # this is a rank: marked tests are run as any other
    try:
        settings = _hosts.settings(
            config.option.jaxfabric_coordinator,
            config.option.jaxfabric_process_id,
            config.option.jaxfabric_num_processes,
            config.option.jaxfabric_job,
            os.environ,
        )
    except _hosts.HostsError as error:
        raise pytest.UsageError(str(error)) from error
    config.pluginmanager.register(_Runner(config, settings), "jaxfabric-runner")


class RanksFailed(Exception):
    """A marked test failed on some rank; carries the outcome of all."""

    def __init__(self, outcome: _outcome.Outcome) -> None:
        super().__init__(outcome.summary)
        self.outcome = outcome


class _Report:
    """The text of a failure, in the form that pytest prints and summarises."""

    def __init__(self, outcome: _outcome.Outcome, item: pytest.Item) -> None:
        path, line, _ = item.location
        self._text = outcome.text
        self.reprcrash = _Crash(path, (line or 0) + 1, outcome.summary)

    def toterminal(self, writer: Any) -> None:
        writer.line(self._text)

    def __str__(self) -> str:
        return self._text


class _Crash:
    def __init__(self, path: str, lineno: int, message: str) -> None:
        self.path = path
        self.lineno = lineno
        self.message = message

    def toterminal(self, writer: Any) -> None:
        writer.line(f"{self.path}:{self.lineno}: {self.message}")


class _Runner:
    """Runs marked tests on clusters."""

    def __init__(self, config: pytest.Config, settings: _hosts.Settings | None) -> None:
        self._config = config
        self._settings = settings
        self._hosts: _hosts.Hosts | None = None
        self._pool = Pool()
        self._following: dict[str, str] = {}
        self._folder: pathlib.Path | None = None
        self._clusters_started = 0

    def pytest_report_header(self) -> str | None:
        if self._settings is None:
            return None
        s = self._settings
        return f"jaxfabric: host {s.index} of {s.count}, host 0 at {s.host}:{s.port}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        marked = [i for i in session.items if i.get_closest_marker(_MARK)]
        last: dict[tuple[int, int], str] = {}
        for item in reversed(marked):
            spec = _spec(item)
            if not isinstance(spec, str) and not spec.fresh:
                if spec.shape in last:
                    self._following[item.nodeid] = last[spec.shape]
                last[spec.shape] = item.nodeid
        if self._settings is not None and not session.config.option.collectonly:
            self._join([item.nodeid for item in marked])

    def _join(self, tests: Sequence[str]) -> None:
        """Meets the other hosts and compares the tests."""
        assert self._settings is not None
        try:
            self._hosts = _hosts.Hosts(self._settings)
            if len(set(self._hosts.gather(_hosts.digest(tests)))) > 1:
                lists = self._hosts.gather(tests)
                raise pytest.UsageError(f"jaxfabric: {_hosts.first_difference(lists)}")
        except _hosts.HostsError as error:
            raise pytest.UsageError(f"jaxfabric: {error}") from error

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        if item.get_closest_marker(_MARK) is None:
            return
        # Fixtures, setUp and tearDown belong to the ranks.
        item.setup = lambda: None  # type: ignore[method-assign]
        item.teardown = lambda: None  # type: ignore[method-assign]
        item.runtest = functools.partial(self._run, item)  # type: ignore[method-assign]
        usual = item.repr_failure

        def repr_failure(excinfo: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(excinfo.value, RanksFailed):
                return _Report(excinfo.value.outcome, item)
            return usual(excinfo, *args, **kwargs)

        item.repr_failure = repr_failure  # type: ignore[method-assign]

    def pytest_sessionfinish(self) -> None:
        # Not later: a project's own hook may check what the ranks left behind.
        self._pool.close()

    def pytest_unconfigure(self) -> None:
        self._pool.close()
        if self._hosts is not None:
            self._hosts.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, item: pytest.Item) -> None:
        """Runs one marked test; in the place of its body."""
        __tracebackhide__ = True
        spec = _spec(item)
        if isinstance(spec, str):
            pytest.fail(spec, pytrace=False)
        count = 1 if self._settings is None else self._settings.count
        if spec.processes % count:
            pytest.skip(
                f"processes={spec.processes} cannot be spread over {count} hosts"
            )
        try:
            outcome = self._run_jointly(item, spec)
        except _hosts.HostsError as error:
            pytest.exit(f"jaxfabric: {error}", returncode=1)
        if not outcome.healthy and not spec.fresh:
            self._pool.discard(spec.shape)
        self._show_output(item, outcome)
        if outcome.status is _outcome.Status.FAILED:
            raise RanksFailed(outcome)
        if outcome.status is _outcome.Status.SKIPPED:
            raise pytest.skip.Exception(outcome.text, _use_item_location=True)

    def _run_jointly(self, item: pytest.Item, spec: _mark.Spec) -> _outcome.Outcome:
        """The test's outcome over all hosts."""
        if self._hosts is None:
            with _processes.LocalPort() as port:
                return self._run_here(item, spec, port.address, port.address)
        # Held here as well, unused, so that all hosts do the same.
        with _processes.LocalPort("0.0.0.0") as port:
            offers = self._hosts.gather([item.nodeid, port.number])
            difference = _hosts.first_difference([[offer[0]] for offer in offers])
            if difference is not None:
                raise _hosts.HostsError(difference)
            address = f"{self._hosts.settings.host}:{offers[0][1]}"
            outcome = self._run_here(item, spec, address, None)
            replies = self._hosts.gather(outcome.to_json())
        return _outcome.merge_hosts([_outcome.Outcome.from_json(r) for r in replies])

    def _run_here(
        self,
        item: pytest.Item,
        spec: _mark.Spec,
        address: str,
        bind: str | None,
    ) -> _outcome.Outcome:
        """The test's outcome on this host's ranks."""
        index, count = 0, 1
        if self._settings is not None:
            index, count = self._settings.index, self._settings.count
        local = spec.processes // count
        layout = Layout(
            processes=spec.processes,
            devices_per_process=spec.devices_per_process,
            first=index * local,
            local=local,
            coordinator=address,
            bind=bind,
            own_service=spec.fresh,
        )
        start = functools.partial(self._start, layout)
        cluster = None
        try:
            cluster = start() if spec.fresh else self._pool.get(spec.shape, start)
            ranks = cluster.run(
                item.nodeid,
                None if spec.fresh else self._following.get(item.nodeid),
                timeout_s=spec.timeout_s or self._timeout_s(),
                grace_s=float(self._config.getini("jaxfabric_grace_s")),
                lost=spec.lost,
            )
        except ClusterError as error:
            summary = "the cluster did not start: " + str(error).split("\n")[0]
            return _outcome.Outcome(
                _outcome.Status.FAILED, summary, str(error), healthy=False
            )
        except BaseException:  # Ctrl-C: the ranks are inside of a test
            if not spec.fresh:
                self._pool.discard(spec.shape)
            raise
        finally:
            if spec.fresh and cluster is not None:
                cluster.kill()
        return _outcome.merge_ranks(ranks)

    def _start(self, layout: Layout) -> Cluster:
        if self._folder is None:
            self._folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxfabric-tests-"))
        self._clusters_started += 1
        folder = self._folder / f"cluster-{self._clusters_started}"
        folder.mkdir()
        return Cluster(layout, _worker_setup(self._config), folder)

    def _timeout_s(self) -> float:
        option = self._config.option.jaxfabric_timeout_s
        return option or float(self._config.getini("jaxfabric_timeout_s"))

    def _show_output(self, item: pytest.Item, outcome: _outcome.Outcome) -> None:
        for title, text in outcome.output:
            if self._config.option.capture == "no":
                sys.stdout.write(f"\n-- {title} --\n{text}")
            else:
                item.add_report_section("call", title, text)


def _spec(item: pytest.Item) -> _mark.Spec | str:
    """What the item's marks say, or what is wrong with them."""
    marks = list(item.iter_markers(_MARK))  # the nearest first
    try:
        return _mark.parse([(mark.args, mark.kwargs) for mark in reversed(marks)])
    except _mark.MarkError as error:
        return str(error)


def _worker_setup(config: pytest.Config) -> dict[str, Any]:
    """What a rank needs to collect the same tests in the same way."""
    args = [f"--rootdir={config.rootpath}"]
    if config.inipath is not None:
        args += ["-c", str(config.inipath)]
    options = {k: v for k, v in vars(config.option).items() if _is_plain(v)}
    return {
        "args": [*args, *(arg.partition("::")[0] for arg in config.args)],
        "options": options,
        "cwd": str(config.invocation_params.dir),
        "sys_path": [os.path.abspath(p) for p in sys.path],
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)
