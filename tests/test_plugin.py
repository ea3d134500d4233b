"""The pytest plugin: outcomes of several ranks, crashes, hangs, and several hosts.

Each test runs pytest in a process of its own on a small file.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest

from jaxfabric.testing import _cluster, _hosts, _mark, _outcome, _pool

TIMEOUT_S = 150.0
INI = """
    [pytest]
    filterwarnings = error
    addopts = --import-mode=importlib -p no:cacheprovider
    jaxfabric_grace_s = 1
"""


@dataclasses.dataclass
class Ended:
    """What an inner pytest printed."""

    code: int
    out: str

    def counts(self) -> dict[str, int]:
        """{"passed": 3, "failed": 1, ...} of the last line."""
        found = re.findall(r"(\d+) (passed|failed|skipped|xfailed|error)", self.last)
        return {name: int(number) for number, name in found}

    @property
    def last(self) -> str:
        return self.out.rstrip().splitlines()[-1]

    def report(self, test: str) -> str:
        """The part of the output that reports the failure of `test`."""
        return re.split(rf"_+ {re.escape(test)} _+\n", self.out)[1].split("\n____")[0]


def inner_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return env | dict(extra or {})


def inner_command(folder: pathlib.Path, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "pytest", str(folder), "-ra", *arguments]


@pytest.fixture
def inner(tmp_path: pathlib.Path) -> Callable[..., Ended]:
    """Runs pytest on a file's text: inner(text, arguments..., VARIABLE=value)."""
    (tmp_path / "pytest.ini").write_text(textwrap.dedent(INI))

    def run(text: str, *arguments: str, **variables: str) -> Ended:
        (tmp_path / "test_inner.py").write_text(HEAD + textwrap.dedent(text))
        done = subprocess.run(
            inner_command(tmp_path, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env=inner_environment(variables),
            cwd=tmp_path,
        )
        assert not still_running(tmp_path)
        return Ended(done.returncode, done.stdout)

    return run


def still_running(folder: pathlib.Path) -> list[str]:
    """Ranks whose working directory is `folder`."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if pathlib.Path(os.readlink(entry / "cwd")) == folder:
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found


HEAD = """
import os, signal, time
import jax
import pytest
two = pytest.mark.jaxfabric(processes=2)
"""


@pytest.mark.smoke
def test_bodies_run_on_all_ranks_of_one_pooled_cluster(
    inner: Callable[..., Ended],
) -> None:
    ended = inner(
        """
        from absl.testing import parameterized

        @pytest.fixture(scope="module")
        def shared():
            return []

        @two
        @pytest.mark.parametrize("value", [1, 2, 3])
        def test_parameters_and_fixtures(value, shared, tmp_path):
            assert jax.process_count() == 2
            shared.append(value)
            assert shared == list(range(1, value + 1))  # kept from test to test
            assert jax.process_index() == 0 or "-1" in str(tmp_path)

        pids = []

        @two
        def test_first():
            pids.append(os.getpid())

        @two
        def test_second():
            assert pids == [os.getpid()]

        @two
        def test_skip():
            pytest.skip("on all ranks")

        @two
        @pytest.mark.skipif(True, reason="decided outside")
        def test_never_runs():
            raise AssertionError

        @two
        @pytest.mark.xfail(strict=True)
        def test_expected_failure():
            assert False

        @pytest.mark.jaxfabric(processes=1, devices_per_process=2)
        class TestCase(parameterized.TestCase):
            def setUp(self):
                super().setUp()
                self.devices = jax.device_count()

            @parameterized.named_parameters(("good", 2), ("bad", 3))
            def test_devices(self, devices):
                self.assertEqual(self.devices, devices)

            @pytest.mark.jaxfabric(processes=2, devices_per_process=1)
            def test_own_mark(self):
                self.assertEqual(jax.process_count(), 2)

            def test_skipped(self):
                self.skipTest("absl's way")

        def test_unmarked():
            assert jax.process_count() == 1
        """,
        "-s",
    )
    assert ended.counts() == {"passed": 8, "failed": 1, "skipped": 3, "xfailed": 1}
    assert "AssertionError: 2 != 3" in ended.report("TestCase.test_devices_bad")
    for reason in ("on all ranks", "decided outside", "absl's way"):
        assert re.search(rf"SKIPPED.*test_inner.py.*: {reason}", ended.out)


def test_failures_name_the_rank_and_the_run_goes_on(
    inner: Callable[..., Ended],
) -> None:
    ended = inner(
        """
        def stuck():
            time.sleep(60)

        @two
        def test_one_rank_fails():
            print(f"output of process {jax.process_index()}")
            assert jax.process_index() != 1, "the cause"

        @two
        def test_peer_waits_for_a_failed_rank():
            if jax.process_index() == 1:
                raise ValueError("gone")
            stuck()

        @two
        def test_crash():
            if jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGSEGV)
            stuck()

        @pytest.mark.jaxfabric(processes=2, timeout_s=1.5)
        def test_hang():
            stuck()

        @two
        def test_unequal_skip():
            if jax.process_index() == 1:
                pytest.skip("only here")

        @pytest.mark.jaxfabric(processe=2)
        def test_typo():
            pass

        @two
        def test_after_all_that():
            assert jax.process_count() == 2
        """,
    )
    assert ended.counts() == {"passed": 1, "failed": 6}

    one = ended.report("test_one_rank_fails")
    assert "rank 1: failed" in one
    assert "AssertionError: the cause" in one
    assert "rank 0" not in one.split("Captured")[0]
    assert "output of process 1" in one
    assert "test_one_rank_fails - rank 1: AssertionError: the cause" in ended.out

    waits = ended.report("test_peer_waits_for_a_failed_rank")
    assert waits.index("rank 1: failed") < waits.index("rank 0: hung")
    assert "in stuck" in waits[waits.index("rank 0: hung") :]

    crash = ended.report("test_crash")
    assert crash.index("rank 1: crashed") < crash.index("rank 0: hung")
    assert "killed by SIGSEGV" in crash
    assert "Segmentation fault" in crash
    assert "in stuck" in crash

    hang = ended.report("test_hang")
    assert hang.count("in stuck") == 2
    assert "timeout_s=1.5" in hang
    assert "only here" in ended.report("test_unequal_skip")
    assert "unknown processe" in ended.report("test_typo")


def test_ranks_may_be_killed_in_clusters_of_their_own(
    inner: Callable[..., Ended],
) -> None:
    ended = inner(
        """
        @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
        @pytest.mark.jaxfabric(processes=2, lost={0})
        def test_rank_0_is_lost(how, tmp_path_factory):
            if jax.process_index() == 0:
                os.kill(os.getpid(), how)
            time.sleep(1.5)  # JAX would have aborted rank 1 by now

        @pytest.mark.jaxfabric(processes=2, lost={0})
        def test_survivors_still_count():
            if jax.process_index() == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("survivor")

        @two
        def test_pooled():
            assert jax.process_count() == 2
        """,
    )
    assert ended.counts() == {"passed": 3, "failed": 1}
    report = ended.report("test_survivors_still_count")
    assert "rank 1: failed" in report
    assert "ValueError: survivor" in report


def test_a_cluster_that_does_not_start(inner: Callable[..., Ended]) -> None:
    ended = inner(
        """
        @two
        def test_never_runs():
            pass
        """,
        JAX_PLATFORMS="no_such_platform",
    )
    assert ended.counts() == {"failed": 1}
    report = ended.report("test_never_runs")
    assert "ended while the cluster started: exit code 1" in report
    assert "no_such_platform" in report


def test_without_the_plugin_tests_are_plain(inner: Callable[..., Ended]) -> None:
    ended = inner(
        """
        @two
        def test_here():
            assert jax.process_count() == 1
        """,
        *("-p", "no:jaxfabric", "-W", "ignore", "-o", "filterwarnings="),
        *("-o", "jaxfabric_grace_s="),
    )
    assert ended.counts() == {"passed": 1}


def test_loading_the_plugin_does_not_import_jax() -> None:
    # It is loaded into every pytest run, where conftest.py files may still have to
    # set JAX's variables; this needs a lazy jaxfabric/__init__.py.
    code = "import sys, jaxfabric.testing.plugin; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    assert done.stdout == "False\n"


def start_hosts(
    folders: list[pathlib.Path],
    *arguments: str,
    envs: list[Mapping[str, str]] | None = None,
) -> list[Ended]:
    """One pytest per folder, as on as many hosts."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    count = len(folders)
    options = [
        f"--jaxfabric-coordinator=127.0.0.1:{port}",
        f"--jaxfabric-num-processes={count}",
        *arguments,
    ]
    hosts = [
        subprocess.Popen(
            inner_command(folder, *options, f"--jaxfabric-process-id={index}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=inner_environment(envs[index] if envs else None),
            cwd=folder,
        )
        for index, folder in enumerate(folders)
    ]
    deadline = time.monotonic() + TIMEOUT_S
    ended = []
    for host in hosts:
        try:
            out, _ = host.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            host.kill()
            out = host.communicate()[0] + "\nkilled by the test"
        ended.append(Ended(host.returncode, out))
    return ended


@pytest.fixture
def hosts_folders(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    folders = [tmp_path / f"host{index}" for index in range(2)]
    for folder in folders:
        folder.mkdir()
        (folder / "pytest.ini").write_text(textwrap.dedent(INI))
    return folders


def test_two_hosts_agree_on_outcomes(hosts_folders: list[pathlib.Path]) -> None:
    text = """
        @two
        def test_good():
            assert jax.process_count() == 2

        @two
        def test_bad_on_host_1():
            assert jax.process_index() != 1, "the cause"

        @pytest.mark.jaxfabric(processes=3)
        def test_not_divisible():
            raise AssertionError
    """
    for folder in hosts_folders:
        (folder / "test_inner.py").write_text(HEAD + textwrap.dedent(text))
    for ended in start_hosts(hosts_folders):
        assert ended.counts() == {"passed": 1, "failed": 1, "skipped": 1}, ended.out
        report = ended.report("test_bad_on_host_1")
        assert "==== host 1 ====" in report
        assert "AssertionError: the cause" in report
        assert "processes=3 cannot be spread over 2 hosts" in ended.out


def test_two_hosts_with_different_tests(hosts_folders: list[pathlib.Path]) -> None:
    for index, folder in enumerate(hosts_folders):
        tests = f"@two\ndef test_a():\n    pass\n\n@two\ndef test_{index}(): pass\n"
        (folder / "test_inner.py").write_text(HEAD + tests)
    for ended in start_hosts(hosts_folders):
        assert ended.code == pytest.ExitCode.USAGE_ERROR
        assert (
            "the first difference is at position 1: host 0 has "
            "test_inner.py::test_0, host 1 has test_inner.py::test_1" in ended.out
        )


def test_two_hosts_with_different_jobs_do_not_meet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    script = textwrap.dedent(
        f"""
        import sys
        from jaxfabric.testing import _hosts
        index = int(sys.argv[1])
        settings = _hosts.Settings("127.0.0.1", {port}, index, 2, f"job {{index}}")
        try:
            _hosts.Hosts(settings, join_timeout_s=60)
        except _hosts.HostsError as error:
            print(error)
        """
    )
    hosts = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", script, str(index)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said, _ = hosts[1].communicate(timeout=TIMEOUT_S)
        assert "another job string" in said
        assert hosts[0].poll() is None  # a stranger does not end its wait
    finally:
        hosts[0].kill()
        hosts[0].communicate()


def test_a_host_that_never_comes_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = _hosts.Settings("127.0.0.1", port, 0, 2)
    with pytest.raises(_hosts.HostsError, match="missing: host 1"):
        _hosts.Hosts(settings, join_timeout_s=0.2)


def test_settings_of_several_hosts() -> None:
    slurm = {
        "SLURM_STEP_NODELIST": "gpu[007-009,012],cpu1",
        "SLURM_JOB_ID": "123456",
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
    }
    expected = _hosts.Settings("gpu007", 23456, 3, 4, "123456")
    for name in ("slurm", "auto"):
        assert _hosts.settings(name, None, None, None, slurm) == expected
    assert _hosts.settings("auto", None, None, None, {}) is None
    assert _hosts.settings(None, None, None, None, slurm) is None
    assert _hosts.settings("[::1]:5", 1, 2, "j", {}) == _hosts.Settings(
        "::1", 5, 1, 2, "j"
    )
    for address, index in (("host", 0), ("host:1", 2), ("host:1", None)):
        with pytest.raises(_hosts.HostsError):
            _hosts.settings(address, index, 2, None, {})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("a-[1-3]", "a-1"), ("a[2,4]-ib,b", "a2-ib")],
)
def test_first_slurm_host(nodes: str, first: str) -> None:
    assert _hosts.first_host(nodes) == first


def test_marks_are_merged_and_checked() -> None:
    spec = _mark.parse([((), {"processes": 4, "timeout_s": 5}), ((), {"lost": (1,)})])
    assert spec == _mark.Spec(4, 1, 5, fresh=True, lost=frozenset({1}))
    bad: tuple[dict[str, Any], ...] = (
        {"processes": 0},
        {"processes": "4"},
        {"timeout_s": 0},
        {"processes": 2, "lost": (2,)},
        {"devices": 2},
    )
    for options in bad:
        with pytest.raises(_mark.MarkError, match=next(reversed(options))):
            _mark.parse([((), options)])
    with pytest.raises(_mark.MarkError, match="keywords"):
        _mark.parse([((4,), {})])


def test_pool_closes_the_cluster_used_least_recently() -> None:
    ended: list[str] = []

    class FakeCluster:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            ended.append(f"close {self.name}")

        def kill(self) -> None:
            ended.append(f"kill {self.name}")

    def get(shape: tuple[int, int], name: str) -> str:
        start = cast("Callable[[], _cluster.Cluster]", lambda: FakeCluster(name))
        return cast("FakeCluster", pool.get(shape, start)).name

    pool = _pool.Pool()
    assert get((2, 1), "a") == "a"
    assert get((4, 1), "b") == "b"
    assert get((2, 1), "not started") == "a"
    assert get((4, 2), "c") == "c"
    assert ended == ["close b"]
    pool.discard((2, 1))
    pool.discard((2, 1))
    pool.close()
    assert ended == ["close b", "kill a", "close c"]


def test_outcomes_of_ranks_are_merged() -> None:
    def rank(
        number: int, status: _outcome.Status, time: float = 1.0
    ) -> _outcome.RankOutcome:
        return _outcome.RankOutcome(number, status, time, f"s{number}", f"t{number}")

    status = _outcome.Status
    merged = _outcome.merge_ranks(
        [
            rank(0, status.HUNG, 1.0),
            rank(1, status.FAILED, 3.0),
            rank(2, status.CRASHED, 2.0),
            rank(3, status.PASSED),
        ]
    )
    assert merged.status is status.FAILED
    assert not merged.healthy
    assert merged.summary == "rank 2: s2"
    assert re.findall(r"t\d", merged.text) == ["t2", "t1", "t0"]

    alike = _outcome.merge_ranks([rank(0, status.FAILED), rank(1, status.FAILED)])
    assert alike.healthy
    lost = _outcome.merge_ranks([rank(0, status.LOST), rank(1, status.PASSED)])
    assert lost.status is status.PASSED

    joint = _outcome.merge_hosts([lost, merged])
    assert joint.status is status.FAILED
    assert joint.summary == "host 1: rank 2: s2"
    assert _outcome.Outcome.from_json(joint.to_json()) == joint
