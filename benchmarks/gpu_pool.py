"""Whether other processes could write into XLA's buffers on a GPU, and where these lie.

    python benchmarks/gpu_pool.py

What a direct push into a program's results would stand on: a handle of the allocation
that another process can open, and addresses. By the driver's functions, on one GPU.
"""

from __future__ import annotations

import ctypes
import os

import jax
import jax.numpy as jnp

ROWS = (4096, 7168)
CALLS = 12


def outcome(cuda: ctypes.CDLL, code: int) -> str:
    """A driver's answer by its name."""
    name = ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(name))
    return (name.value or str(code).encode()).decode()


def ways_out(cuda: ctypes.CDLL, address: int) -> list[str]:
    """What each way to share the memory at an address says."""
    said = []
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    at = ctypes.c_uint64(address)
    code = cuda.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), at)
    said.append(f"cuMemGetAddressRange {outcome(cuda, code)}, {size.value >> 20} MiB")
    ipc = (ctypes.c_char * 64)()
    code = cuda.cuIpcGetMemHandle(ipc, at)
    said.append(f"cuIpcGetMemHandle {outcome(cuda, code)}")
    handle = ctypes.c_uint64()
    code = cuda.cuMemRetainAllocationHandle(
        ctypes.byref(handle), ctypes.c_void_p(address)
    )
    said.append(f"cuMemRetainAllocationHandle {outcome(cuda, code)}")
    if code == 0:
        posix_fd, descriptor = 1, ctypes.c_int(-1)
        code = cuda.cuMemExportToShareableHandle(
            ctypes.byref(descriptor), handle, posix_fd, ctypes.c_uint64(0)
        )
        said.append(f"cuMemExportToShareableHandle {outcome(cuda, code)}")
        if code == 0:
            os.close(descriptor.value)
        cuda.cuMemRelease(handle)
    return said


def addresses(donate: bool) -> list[int]:
    """Of the results of one program, called again and again."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0 if donate else ())
    x = jnp.zeros(ROWS, jnp.bfloat16)
    found = []
    for _ in range(CALLS):
        x = jax.block_until_ready(step(x))
        found.append(x.unsafe_buffer_pointer())
    return found


def main() -> None:
    """Prints all of it."""
    gpus = jax.devices()
    if gpus[0].platform != "gpu":
        print(f"skipped: the first device is {gpus[0].device_kind}")
        return
    cuda = ctypes.CDLL("libcuda.so.1")
    x = jax.block_until_ready(jnp.zeros(ROWS, jnp.bfloat16) + 1)
    print(f"{gpus[0].device_kind}, jax {jax.__version__}")
    for said in ways_out(cuda, x.unsafe_buffer_pointer()):
        print(f"  {said}")
    for donate in (False, True):
        found = addresses(donate)
        print(f"  {donate=}: {len(set(found))} addresses in {CALLS} calls")


if __name__ == "__main__":
    main()
