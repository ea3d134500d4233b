"""The first file system of a guest: busybox, and the modules that reach the root."""

from __future__ import annotations

import lzma
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from . import CannotRun
from .kernel import Kernel

MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
FOLDERS = ("bin", "dev", "modules", "new", "proc", "root-lower", "root-upper", "sys")
INIT = Path(__file__).with_name("init.sh")


@dataclass(frozen=True)
class Entry:
    """A file, or a folder if it has no data."""

    path: str
    data: bytes | None = None


def build(kernel: Kernel) -> bytes:
    """The archive that the kernel unpacks and whose /init it starts.

    Raises:
      CannotRun: there is no busybox, or a module is missing.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise CannotRun("no `busybox` on PATH (package busybox-static)")
    entries = [Entry(folder) for folder in FOLDERS]
    entries.append(Entry("bin/busybox", Path(busybox).read_bytes()))
    entries.append(Entry("init", INIT.read_bytes()))
    for number, file in enumerate(kernel.module_files(*MODULES)):
        # By number, so that the shell's *.ko is the order of loading.
        entries.append(Entry(f"modules/{number:02}-{file.stem}.ko", _read(file)))
    return archive(entries)


def _read(module: Path) -> bytes:
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


def archive(entries: list[Entry]) -> bytes:
    """The entries as a cpio archive of the kind "newc".

    The kernel's documentation has the format: early-userspace/buffer-format.
    """
    whole = bytearray()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", b"")], 1):
        kind = stat.S_IFDIR if entry.data is None else stat.S_IFREG
        data, name = entry.data or b"", entry.path.encode() + b"\0"
        links = 2 if entry.data is None else 1
        fields = (number, kind | 0o755, 0, 0, links, 0, len(data))
        devices_name_checksum = (0, 0, 0, 0, len(name), 0)
        whole += b"070701"
        for field in (*fields, *devices_name_checksum):
            whole += b"%08X" % field
        whole += name
        whole += bytes(-len(whole) % 4)
        whole += data
        whole += bytes(-len(whole) % 4)
    return bytes(whole)
