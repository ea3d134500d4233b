"""The floor on GPUs: how fast the driver copies from GPU to GPU, both ways at once.

By way of ctypes, since no program of XLA's only copies. Both GPUs must be visible to
this process; that JAX uses only one of them does not matter.
"""

from __future__ import annotations

import ctypes
import time

_BYTES = 128 << 20
_COPIES = 20
_ALREADY_ENABLED = 704  # CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED


class NotMeasured(Exception):
    """The reason why there is no figure."""


def copy_rate() -> float:
    """Bytes per second of copies from GPU 0 to GPU 1, the same flowing back.

    Raises:
      NotMeasured: fewer than two GPUs, no driver, or an error of the driver's.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NotMeasured(str(error)) from None

    def call(name: str, *arguments: object) -> None:
        code = getattr(cuda, name)(*arguments)
        if code != 0:
            raise NotMeasured(f"{name} returned {code}")

    call("cuInit", 0)
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    if count.value < 2:
        raise NotMeasured(f"this process sees {count.value} GPU")
    before = ctypes.c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(before))
    contexts = [ctypes.c_void_p() for _ in range(2)]
    buffers = [(ctypes.c_uint64(), ctypes.c_uint64()) for _ in range(2)]
    streams = [ctypes.c_void_p() for _ in range(2)]
    try:
        for device in range(2):
            context = contexts[device]
            call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            call("cuCtxSetCurrent", context)
            for buffer in buffers[device]:
                call("cuMemAlloc_v2", ctypes.byref(buffer), ctypes.c_size_t(_BYTES))
            call("cuStreamCreate", ctypes.byref(streams[device]), 1)
        for device in range(2):
            # Without it the driver copies by way of the host.
            call("cuCtxSetCurrent", contexts[device])
            code = cuda.cuCtxEnablePeerAccess(contexts[1 - device], 0)
            if code not in (0, _ALREADY_ENABLED):
                raise NotMeasured(f"cuCtxEnablePeerAccess returned {code}")

        def copy(times: int) -> None:
            for _ in range(times):
                for here in range(2):
                    there = 1 - here
                    call("cuCtxSetCurrent", contexts[here])
                    call(
                        "cuMemcpyPeerAsync",
                        *(buffers[there][1], contexts[there]),
                        *(buffers[here][0], contexts[here]),
                        *(ctypes.c_size_t(_BYTES), streams[here]),
                    )
            for here in range(2):
                call("cuCtxSetCurrent", contexts[here])
                call("cuStreamSynchronize", streams[here])

        copy(2)
        begin = time.perf_counter()
        copy(_COPIES)
        return _COPIES * _BYTES / (time.perf_counter() - begin)
    finally:
        for device in range(2):
            if not contexts[device]:
                continue
            cuda.cuCtxSetCurrent(contexts[device])
            if streams[device]:
                cuda.cuStreamDestroy_v2(streams[device])
            for buffer in buffers[device]:
                if buffer:
                    cuda.cuMemFree_v2(buffer)
            cuda.cuDevicePrimaryCtxRelease_v2(device)
        cuda.cuCtxSetCurrent(before)
