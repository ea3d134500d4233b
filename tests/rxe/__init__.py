"""Virtual machines with soft-RoCE devices: the kernel's own verbs, no NIC needed.

`python -m tests.rxe --help` says how to run a command in one.
"""

from __future__ import annotations


class CannotRun(Exception):
    """This machine cannot run such a virtual machine; the text says why."""
