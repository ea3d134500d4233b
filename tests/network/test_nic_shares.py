"""Processes of one host share its software EFA devices, each the closest ones."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from network.softefa import SoftEfa

PROGRAM = """
import jax, jaxfabric as jf
from jaxfabric import _interfaces
gpus = {gpus}
if gpus:
    _interfaces.local_gpus = lambda: [gpus[jax.process_index()]]
mesh = jax.make_mesh((jax.device_count(),), ("x",))
with jf.Fabric(mesh, transport="ofi/efa") as fabric:
    print("nics", *fabric.nics)
"""


def _shares(
    softefa_build: Path, tmp_path: Path, gpus: list[str], **variables: str
) -> list[list[str]]:
    """The NICs that each of two processes with these GPUs gets of four."""
    script = tmp_path / "script.py"
    script.write_text(PROGRAM.format(gpus=gpus))
    launcher = [sys.executable, "-P", "-m", "jaxfabric._cli", "run", "-n2"]
    with SoftEfa(softefa_build, nics=4) as network:
        run = subprocess.run(
            [*launcher, "--timeout-s=60", str(script)],
            env=os.environ | network.environment() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
        )
    assert run.returncode == 0, run.stdout
    lines = sorted(line for line in run.stdout.splitlines() if "nics " in line)
    assert len(lines) == 2, run.stdout
    return [line.split("nics ", 1)[1].split() for line in lines]


def test_each_process_has_its_own(
    softefa_build: Path, libfabric: str, tmp_path: Path
) -> None:
    shares = _shares(softefa_build, tmp_path, [])
    assert [len(share) for share in shares] == [2, 2]
    assert sorted(shares[0] + shares[1]) == [f"softefa{nic}-rdm" for nic in range(4)]


def _package(number: int) -> str:
    """A package of hwloc's XML: a core, and behind one bridge a GPU and two NICs."""
    sets = f'cpuset="0x{1 << number}" complete_cpuset="0x{1 << number}" '
    sets += f'nodeset="0x{1 << number}" complete_nodeset="0x{1 << number}"'
    index = 100 * (number + 1)
    kinds = [("0302", "cuda", 5), ("0200", "softefa", 3), ("0200", "softefa", 3)]
    devices = ""
    for i, (kind, name, os_kind) in enumerate(kinds):
        unit = number if i == 0 else 2 * number + i - 1
        devices += f"""
<object type="PCIDev" gp_index="{index + 10 + i}" pci_busid="0000:{number}1:0{i}.0"
 pci_type="{kind} [1d0f:efa0] [0000:0000] 00" pci_link_speed="0.0">
<object type="OSDev" gp_index="{index + 20 + i}" name="{name}{unit}"
 osdev_type="{os_kind}"/></object>"""
    return f"""
<object type="Package" os_index="{number}" {sets} gp_index="{index}">
<object type="NUMANode" os_index="{number}" {sets} gp_index="{index + 1}"/>
<object type="Core" os_index="{number}" {sets} gp_index="{index + 2}">
<object type="PU" os_index="{number}" {sets} gp_index="{index + 3}"/></object>
<object type="Bridge" gp_index="{index + 4}" bridge_type="0-1" depth="0"
 bridge_pci="0000:[{number}0-{number}f]">{devices}</object></object>"""


def test_each_gpu_has_the_nics_of_its_package(
    softefa_build: Path, libfabric: str, tmp_path: Path
) -> None:
    try:
        ctypes.CDLL("libhwloc.so.15")
    except OSError:
        pytest.skip("no libhwloc.so.15: apt-get install libhwloc15")
    sets = 'cpuset="0x3" complete_cpuset="0x3" allowed_cpuset="0x3" '
    sets += 'nodeset="0x3" complete_nodeset="0x3" allowed_nodeset="0x3"'
    topology = tmp_path / "topology.xml"
    topology.write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<!DOCTYPE topology SYSTEM "hwloc2.dtd">\n<topology version="2.0">'
        f'<object type="Machine" os_index="0" {sets} gp_index="1">'
        f"{_package(0)}{_package(1)}</object></topology>"
    )
    # hwloc then tells of this machine instead of the real one. Both processes may run
    # on the same cores, so it is the GPUs that decide.
    shares = _shares(
        *(softefa_build, tmp_path, ["0000:11:00.0", "0000:01:00.0"]),
        HWLOC_XMLFILE=str(topology),
    )
    assert shares == [
        ["softefa2-rdm", "softefa3-rdm"],
        ["softefa0-rdm", "softefa1-rdm"],
    ]
