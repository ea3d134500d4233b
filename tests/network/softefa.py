"""A network of software EFA devices, for programs that use libfabric's `efa`.

    with SoftEfa(build, nics=4, gbps="8,8,8,2") as network:
        subprocess.Popen(program, env=os.environ | network.environment(host=1))
        network.set_faults("* 2 down")

tests/softefa/settings.h says what the settings mean, faults.h what can fail.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

LIBRARY = Path("tests/softefa/libsoftefa.so")  # in the build folder


class SoftEfa:
    """The directory that all processes of one software network share.

    Args:
        build: the CMake build folder with the device in it.
        nics: NICs of each host, 1 to 4.
        settings: further SOFTEFA_* variables, in lower case and without prefix.
    """

    def __init__(self, build: Path, *, nics: int = 1, **settings: str | float) -> None:
        self.nics = nics
        self._library = build / LIBRARY
        self._settings = settings
        self._directory = Path()

    def __enter__(self) -> SoftEfa:
        self._directory = Path(tempfile.mkdtemp(prefix="softefa-"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._directory)

    @property
    def nic_names(self) -> list[str]:
        """What libfabric calls the NICs."""
        return [f"softefa{nic}-rdm" for nic in range(self.nics)]

    def environment(self, host: int | None = None) -> dict[str, str]:
        """Variables of a process on a host; None: each process is a host."""
        variables = {
            "LD_PRELOAD": str(self._library.resolve()),
            "SOFTEFA_DIR": str(self._directory),
            "SOFTEFA_NDEV": str(self.nics),
            # Hosts that are processes of one machine must not find that out.
            "FI_EFA_ENABLE_SHM_TRANSFER": "0",
        }
        if host is not None:
            variables["SOFTEFA_HOST"] = str(host)
        for name, value in self._settings.items():
            variables[f"SOFTEFA_{name.upper()}"] = str(value)
        return variables

    def set_faults(self, *lines: str) -> None:
        """Makes exactly these NICs unwell, each by "HOST NIC STATE"."""
        draft = self._directory / "faults.new"
        draft.write_text("".join(f"{line}\n" for line in lines))
        os.replace(draft, self._directory / "faults")
