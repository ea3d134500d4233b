"""The bench itself, from outside: what it runs, and how that ends."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rxe import CannotRun, devices, initramfs, kernel, remote
from rxe.__main__ import CACHE, SKIPPED
from rxe.kernel import Kernel
from rxe.machine import TIMED_OUT

ROOT = Path(__file__).resolve().parents[2]


def bench(
    *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m tests.rxe` with arguments."""
    return subprocess.run(
        [sys.executable, "-m", "tests.rxe", *arguments],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.fixture
def stock() -> None:
    """Skips where there is no guest to be had without downloading its kernel."""
    if not (CACHE / "kernel").is_dir():
        pytest.skip("no kernel: `python -m tests.rxe -- true` fetches it")


@pytest.fixture
def small_kernel(tmp_path: Path) -> Kernel:
    """A kernel of three modules, the first of which needs the others."""
    modules = tmp_path / "lib/modules/6.1.0-1-amd64"
    modules.mkdir(parents=True)
    lines = ["fs/top.ko: net/mid-dle.ko net/low.ko", "net/mid-dle.ko: net/low.ko"]
    (modules / "modules.dep").write_text("\n".join([*lines, "net/low.ko:"]))
    (modules / "modules.builtin").write_text("drivers/inside.ko\n")
    return Kernel(tmp_path, modules.name)


def test_modules_are_loaded_after_what_they_need(small_kernel: Kernel) -> None:
    files = small_kernel.module_files("inside", "top", "mid_dle")
    assert [file.stem for file in files] == ["low", "mid-dle", "top"]


def test_a_missing_module_is_named(small_kernel: Kernel) -> None:
    with pytest.raises(CannotRun, match="has no module rdma_rxe"):
        small_kernel.module_files("rdma_rxe")


def test_the_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    if shutil.which("busybox") is None:
        pytest.skip("no `busybox`")
    entries = [
        initramfs.Entry("folder"),
        initramfs.Entry("folder/odd", b"12345"),
        initramfs.Entry("empty", b""),
    ]
    subprocess.run(
        ["busybox", "cpio", "-i"],
        cwd=tmp_path,
        input=initramfs.archive(entries),
        check=True,
        timeout=20,
    )
    found = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert [str(path) for path in found] == ["empty", "folder", "folder/odd"]
    assert (tmp_path / "folder/odd").read_bytes() == b"12345"
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ({}, "no `apt-get` on PATH"),
        ({"apt-cache": "true", "apt-get": "true"}, "apt knows no package linux-image"),
        (
            {
                "apt-cache": "echo '  Depends: linux-image-6.1.0-9-amd64'",
                "apt-get": "echo 'E: no network' >&2; exit 100",
            },
            "apt-get update: E: no network",
        ),
    ],
    ids=["not Debian", "another distribution's packages", "no network"],
)
def test_a_kernel_that_is_not_to_be_had_is_a_reason_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tools: dict[str, str],
    reason: str,
) -> None:
    programs, cache = tmp_path / "programs", tmp_path / "cache"
    programs.mkdir()
    for name, script in tools.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(CannotRun, match=reason):
        kernel.fetch(cache)
    assert not list(cache.iterdir())


def test_what_is_missing_is_exit_status_77_and_a_reason(stock: None) -> None:
    run = bench("--", "true", environment={"PATH": ""})
    assert run.returncode == SKIPPED
    assert run.stderr.splitlines()[-1].startswith("tests.rxe: no `qemu-system-x86_64`")


@pytest.mark.slow
def test_the_command_is_at_home(stock: None) -> None:
    script = 'echo "$WORD"; pwd; rdma link show; echo x >/usr/new || exit 9; exit 3'
    run = bench(
        *("--rails", "2", "--", "sh", "-c", script),
        environment={"WORD": "with 'quotes' and $signs"},
    )
    assert run.returncode == 3, run.stdout + run.stderr
    word, folder, *links = run.stdout.splitlines()
    assert word == "with 'quotes' and $signs"
    assert folder == str(ROOT)
    assert ["rxe0/1", "rxe1/1"] == [link.split()[1] for link in links]
    assert all("state ACTIVE" in link for link in links)
    assert not Path("/usr/new").exists()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_no_guest_outlives_the_bench(
    stock: None, tmp_path: Path, by: signal.Signals
) -> None:
    command = [sys.executable, "-m", "tests.rxe", "--", "sleep", "1000"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        devices.wait_until(lambda: children.read_text() != "")
        (guest,) = children.read_text().split()
        name = Path("/proc", guest, "comm")
        devices.wait_until(lambda: name.read_text().startswith("qemu"))
        process.send_signal(by)
        devices.wait_until(lambda: not Path("/proc", guest).exists())
        assert process.wait(20) in (-by, 128 + by)


def test_a_guest_that_takes_too_long_is_ended(stock: None) -> None:
    begin = time.monotonic()
    run = bench("--timeout-s", "2", "--", "sleep", "1000")
    assert run.returncode == TIMED_OUT
    assert "not done in 2 s" in run.stderr
    assert time.monotonic() - begin < 30


@pytest.mark.slow
def test_the_other_guest_runs_what_it_is_told(stock: None) -> None:
    there = shlex.join(remote.command([]))
    script = f"""
set -e
{there} sh -c 'echo up; exec sleep 777' >/tmp/out & asker=$!
until grep -q up /tmp/out; do sleep 0.1; done
kill -KILL $asker
echo said | {there} sh -c 'cat; hostname; pgrep -x sleep; kill -9 $$' || test $? = 137
{there} no-such-program || test $? = 127
"""
    run = bench("--hosts", "2", "--rails", "2", "--", "sh", "-c", script)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines() == [
        "said",  # and no sleep is left
        "rxe1",
        "no `no-such-program` on the other guest",
    ]
