"""A router for disaggregated serving: prompts over HTTP, jobs behind it.

`Router` chooses a prefill and a decode job for each prompt, tells both, and streams
the tokens that the decode job makes. Pages go from job to job by `jf.kv`, never
through the router. Jobs come to it, by `JobLink`, at any time and in any number.
Needs ``pip install 'jaxfabric[serve]'``.
"""

from __future__ import annotations

from jaxfabric.kv.serve._http import create_app
from jaxfabric.kv.serve._job_link import JobLink
from jaxfabric.kv.serve._prompt import ByteText, Prompt, RequestError
from jaxfabric.kv.serve._router import Router

__all__ = [
    "ByteText",
    "JobLink",
    "Prompt",
    "RequestError",
    "Router",
    "create_app",
]
