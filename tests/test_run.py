"""`jaxfabric run`: output, failures, time limits, signals, and no process left."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import pytest

from jaxfabric._cli import _output, _processes

TIMEOUT_S = 90.0


@dataclasses.dataclass
class Ended:
    """How one `jaxfabric run` ended."""

    code: int
    out: str
    err: str
    seconds: float


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "jaxfabric._cli", "run", *arguments]


@pytest.fixture
def launch(tmp_path: pathlib.Path) -> Callable[..., Ended]:
    """Runs a script's text: launch(text, options, script arguments)."""

    def run(text: str, options: str = "-n 2", *arguments: str) -> Ended:
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(text))
        begin = time.monotonic()
        done = subprocess.run(
            command(*options.split(), str(script), *arguments),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        seconds = time.monotonic() - begin
        return Ended(done.returncode, done.stdout, done.stderr, seconds)

    return run


def processes_with(text: str) -> list[int]:
    """Processes whose command line contains `text`."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
            # A zombie has no command line and is only waiting for its parent.
            if text.encode() in line:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


SUM = """
    import sys
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P
    import neighbour

    jax.distributed.initialize()
    n = jax.device_count()
    mesh = jax.make_mesh((n,), ("x",))
    x = jax.make_array_from_callback(
        (n,), NamedSharding(mesh, P("x")), lambda i: jnp.arange(n)[i]
    )
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))(x)
    print(jax.process_index(), jax.local_device_count(), int(total), sys.argv[1:],
          __name__, neighbour.NAME)
"""


@pytest.mark.smoke
def test_ranks_are_connected_before_the_first_line(
    launch: Callable[..., Ended], tmp_path: pathlib.Path
) -> None:
    # The script's own folder is importable, and initialize() is allowed.
    (tmp_path / "neighbour.py").write_text("NAME = 'next door'\n")
    ended = launch(SUM, "-n 2 --devices-per-process 2", "--flag", "-n", "9")
    assert ended.code == 0, ended.err
    for rank in range(2):
        line = f"[{rank}] {rank} 2 6 ['--flag', '-n', '9'] __main__ next door"
        assert line in ended.out.splitlines()


def test_one_process(launch: Callable[..., Ended]) -> None:
    ended = launch("import jax; print(jax.process_count())", "-n 1")
    assert ended.code == 0, ended.err
    assert "[0] 1" in ended.out


def test_first_failure_is_named_and_its_code_kept(
    launch: Callable[..., Ended],
) -> None:
    ended = launch(
        """
        import atexit, sys, time, jax
        if jax.process_index() == 1:
            atexit.register(print, "own atexit function")
            raise ValueError("the cause")
        time.sleep(1)
        sys.exit(7)
        """,
        "-n 3 --grace-s 40",
    )
    assert ended.code == 1
    assert ended.seconds < 30  # all had ended: nobody waits for the grace to pass
    block = ended.err[ended.err.index("first failure: rank 1, exit code 1") :]
    assert "  | ValueError: the cause" in block
    assert "_bootstrap.py" not in block
    assert "other ranks: 0 exit code 7, 2 exit code 7" in block
    assert "[1] own atexit function" in ended.out


def test_exit_code_of_sys_exit(launch: Callable[..., Ended]) -> None:
    ended = launch(
        """
        import sys, time, jax
        if jax.process_index() == 1:
            sys.exit(42)
        time.sleep(60)
        """,
        "-n 2 --grace-s 0",
    )
    assert ended.code == 42
    assert "first failure: rank 1, exit code 42" in ended.err
    assert "other ranks: 0 ended by the launcher" in ended.err


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(
    launch: Callable[..., Ended],
) -> None:
    ended = launch(
        """
        import os, signal, time, jax
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(60)
        """,
        "-n 2 --grace-s 1",
    )
    assert ended.code == 128 + signal.SIGSEGV
    assert "first failure: rank 1, killed by SIGSEGV" in ended.err
    assert "Fatal Python error: Segmentation fault" in ended.err
    assert ended.seconds < 30


def test_time_limit_shows_the_stacks_of_all_ranks(
    launch: Callable[..., Ended],
) -> None:
    ended = launch(
        """
        import time
        def stuck_here():
            time.sleep(60)
        stuck_here()
        """,
        "-n 2 --timeout-s 5",
    )
    assert ended.code == 124
    for rank in range(2):
        stack = [x for x in ended.err.splitlines() if x.startswith(f"[{rank}]")]
        assert any("in stuck_here" in line for line in stack)
    assert ended.seconds < 30


def test_initialize_with_other_arguments_is_refused(
    launch: Callable[..., Ended],
) -> None:
    ended = launch(
        "import jax; jax.distributed.initialize('localhost:1', 3, 0)",
        "-n 2 --grace-s 1",
    )
    assert ended.code == 1
    assert "num_processes=3, process_id=0" in ended.err
    assert "of num_processes=2" in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_ranks(tmp_path: pathlib.Path, number: int) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(
        "import subprocess, sys, time\n"
        # Named like the script, so that a survivor would be seen below.
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)', __file__]\n"
        "subprocess.Popen(sleep)\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        command("-n", "2", str(script)), stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        up = {launcher.stdout.readline() for _ in range(2)}
        assert up == {"[0] up\n", "[1] up\n"}
        launcher.send_signal(number)
        assert launcher.wait(TIMEOUT_S) == 128 + number
    assert processes_with(str(script)) == []


def test_ranks_die_with_a_killed_launcher(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen(
        command("-n", "2", str(script)), stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        assert len(processes_with(str(script))) >= 2
        launcher.kill()
        launcher.wait(TIMEOUT_S)
        assert wait_until(lambda: not processes_with(str(script)))


def test_a_reader_that_leaves_ends_the_job(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "talker.py"
    script.write_text("import time\nfor i in range(600):\n  print(i); time.sleep(.1)\n")
    with subprocess.Popen(
        command("-n", "2", str(script)), stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        launcher.stdout.close()
        assert launcher.wait(TIMEOUT_S) == 128 + signal.SIGPIPE
    assert processes_with(str(script)) == []


def test_help_and_bad_arguments() -> None:
    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "jaxfabric._cli", *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    shown = cli("run", "--help").stdout
    assert "jaxfabric run -n 4" in shown
    assert "--grace-s" in shown
    assert cli("--version").stdout.startswith("jaxfabric ")
    missing = cli("run", "-n", "2", "no_such_file.py")
    assert missing.returncode == 2
    assert "there is no file no_such_file.py" in missing.stderr
    assert cli("run", "-n", "0", __file__).returncode == 2


def test_environment_of_a_rank() -> None:
    base = {"XLA_FLAGS": "--a --xla_force_host_platform_device_count=9 --b"}
    env = _processes.child_environment(20, 1, base)
    assert env["JAX_PLATFORMS"] == "cpu"
    assert env["JAX_NUM_CPU_DEVICES"] == "20"
    assert env["XLA_FLAGS"].split() == ["--a", "--b"]
    assert int(env["PJRT_NPROC"]) == max(os.cpu_count() or 1, 80)
    assert env["NPROC"] == env["PJRT_NPROC"]
    assert "JAX_LOCAL_DEVICE_IDS" not in env

    own = _processes.child_environment(
        2, 3, {"PJRT_NPROC": "5", "JAX_PLATFORMS": "cuda,cpu"}
    )
    assert own["PJRT_NPROC"] == "5"
    assert own["JAX_LOCAL_DEVICE_IDS"] == "6,7"


def test_whoever_has_gpus_is_told_of_cpu_ranks(tmp_path: pathlib.Path) -> None:
    assert _processes.platform_note({}, tmp_path) == ""  # no GPU
    (tmp_path / "0000:00:04.0").mkdir()
    assert "JAX_PLATFORMS=cuda" in _processes.platform_note({}, tmp_path)
    assert _processes.platform_note({"JAX_PLATFORMS": "cpu"}, tmp_path) == ""
    assert _processes.platform_note({}, tmp_path / "absent") == ""


def test_lines_of_a_progress_bar_show_its_last_state(
    capfd: pytest.CaptureFixture[str],
) -> None:
    lines = _output.RankLines(3, 1, over_bar=False)
    lines.feed(b"1%\r50")
    lines.feed(b"%\r100%\nnext\r\n")
    lines.feed(b"unfinished")
    lines.close()
    assert capfd.readouterr().out == "[3] 100%\n[3] next\n[3] unfinished\n"
    assert list(lines.tail) == ["100%", "next", "unfinished"]


def test_a_held_port_is_free_for_a_server_that_shares_it() -> None:
    with _processes.LocalPort() as port:
        host, _, number = port.address.rpartition(":")
        with pytest.raises(OSError, match="in use"):
            socket.create_server((host, int(number)))
        with socket.create_server((host, int(number)), reuse_port=True) as server:
            with socket.create_connection((host, port.number), timeout=5):
                server.accept()[0].close()
