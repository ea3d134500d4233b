"""Debian's stock kernel, unpacked into a build folder and never installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import CannotRun

META_PACKAGE = "linux-image-amd64"  # depends on the newest; the cloud variant has no 9p
DOWNLOAD_TIMEOUT_S = 150  # 70 MB
UNPACK_TIMEOUT_S = 60
QUERY_TIMEOUT_S = 20
NEEDED_MODULE = "rdma_rxe"


@dataclass(frozen=True)
class Kernel:
    """A kernel package, unpacked.

    Attributes:
      folder: has boot/ and lib/modules/ in it.
      version: as `uname -r` says it.
    """

    folder: Path
    version: str

    @property
    def image(self) -> Path:
        """What to boot."""
        return self.folder / "boot" / f"vmlinuz-{self.version}"

    @property
    def modules(self) -> Path:
        """What belongs at /lib/modules/VERSION."""
        return self.folder / "lib/modules" / self.version

    def module_files(self, *names: str) -> list[Path]:
        """The files of modules and of what they depend on, first to load first.

        Raises:
          CannotRun: the kernel has no such module.
        """
        needs: dict[str, list[str]] = {}  # by name: the module's file, and others
        for line in (self.modules / "modules.dep").read_text().splitlines():
            path, _, others = line.partition(":")
            needs[_module_name(path)] = [path, *others.split()]
        built_in = (self.modules / "modules.builtin").read_text().splitlines()
        within = {_module_name(path) for path in built_in}
        files: list[str] = []
        for name in names:
            if name in needs:
                files += reversed(needs[name])
            elif name not in within:
                raise CannotRun(f"kernel {self.version} has no module {name}")
        return [self.modules / path for path in dict.fromkeys(files)]


def _module_name(path: str) -> str:
    return Path(path).name.split(".ko")[0].replace("-", "_")


def _run(command: Sequence[str], folder: Path, timeout_s: float) -> str:
    """What the command prints.

    Raises:
      CannotRun: it is not installed, failed, or took too long.
    """
    try:
        run = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=timeout_s
        )
    except FileNotFoundError:
        raise CannotRun(f"no `{command[0]}` on PATH") from None
    except subprocess.TimeoutExpired:
        raise CannotRun(f"{' '.join(command)}: not done in {timeout_s:g} s") from None
    if run.returncode:
        last_words = " ".join((run.stderr or run.stdout).split())[-200:]
        raise CannotRun(f"{' '.join(command)}: {last_words or run.returncode}")
    return run.stdout


def fetch(cache: Path) -> Kernel:
    """The kernel in the cache folder, after downloading it if need be.

    Args:
      cache: may be shared by processes that do this at the same time.

    Raises:
      CannotRun: the package is not to be had, or has no soft-RoCE.
    """
    folder = cache / "kernel"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=cache, prefix="kernel-"))
        try:
            _download(draft)
            # Whole or not at all; another process may have been faster.
            if not folder.is_dir():
                os.rename(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    kernel = Kernel(folder, _version(folder))
    kernel.module_files(NEEDED_MODULE)
    return kernel


def _version(folder: Path) -> str:
    return next((folder / "lib/modules").iterdir()).name


def _download(folder: Path) -> None:
    try:
        _download_package(folder)
    except CannotRun:
        # The lists of packages are old, or have never been there.
        _run(["apt-get", "update"], folder, DOWNLOAD_TIMEOUT_S)
        _download_package(folder)
    archive = next(folder.glob("*.deb"))
    _run(["dpkg", "-x", archive.name, "."], folder, UNPACK_TIMEOUT_S)
    archive.unlink()
    tool = shutil.which("depmod", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    _run([tool or "depmod", "-b", ".", _version(folder)], folder, UNPACK_TIMEOUT_S)


def _download_package(folder: Path) -> None:
    listing = _run(["apt-cache", "depends", META_PACKAGE], folder, QUERY_TIMEOUT_S)
    package = re.search(r"Depends: (linux-image-\S+)", listing)
    if package is None:
        raise CannotRun(f"apt knows no package {META_PACKAGE}")
    _run(["apt-get", "download", package[1]], folder, DOWNLOAD_TIMEOUT_S)
