"""Flat memory that two processes see, and tensors laid out in it.

On CPU an arena is an anonymous file (memfd) mapped by both; its descriptor travels over the
channel. On CUDA it is one allocation of the driver, opened in the other process by its 64-byte IPC
handle. Either way it is one flat buffer of bytes, and a tensor in it is an offset, a dtype, a shape
and strides: plain JSON, so that no pickle crosses between processes.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import Any

import torch

ALIGN = 256
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Arena:
    """A flat byte buffer; `base` is its uint8 tensor."""

    base: torch.Tensor

    def __init__(self, size: int, device: str, *, fd: int = -1, handle: str = ""):
        self.device, self.fd, self.handle = device, fd, handle
        # Whole pages: beyond its end a file's last page is memory that nobody would wipe.
        self.size = size = size + -size % mmap.PAGESIZE
        if device == "cpu":
            if fd < 0:
                self.fd = os.memfd_create("ttkit-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.ftruncate(self.fd, size)
                # A candidate that truncates the file would crash whoever reads it next.
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            self._map = mmap.mmap(self.fd, size)
            self.base = torch.frombuffer(self._map, dtype=torch.uint8)
        else:
            self._pointer, self.handle = _cuda_open(handle) if handle else _cuda_allocate(size)
            self.base = torch.as_tensor(_CudaBytes(self._pointer, size), device=device)

    def view(self, spec: dict[str, Any]) -> torch.Tensor:
        """The tensor that `spec` describes; raises ValueError when it lies outside the arena."""
        dtype = getattr(torch, spec["dtype"])
        shape, stride, offset = spec["shape"], spec["stride"], spec["offset"]
        span = spanned_bytes(spec)
        if offset < 0 or offset % ALIGN or offset + span > self.size:
            raise ValueError("a tensor lies outside the arena")
        if not span:
            return torch.empty(shape, dtype=dtype, device=self.base.device)
        flat = self.base[offset : offset + span].view(dtype)
        return flat.as_strided(shape, stride)

    def scramble(self, specs: list[dict[str, Any]], key: int) -> None:
        """Make what `specs` describe unreadable to who does not know `key`; twice undoes it."""
        numbers = torch.Generator(self.base.device).manual_seed(key)
        for spec in specs:
            flat = {"dtype": "uint8", "shape": [spanned_bytes(spec)], "stride": [1]}
            there = self.view(spec | flat)
            pad = torch.empty(-(-len(there) // 8), dtype=torch.int64, device=there.device)
            pad.random_(-(2**63), None, generator=numbers)
            there.bitwise_xor_(pad.view(torch.uint8)[: len(there)])


def spanned_bytes(spec: dict[str, Any]) -> int:
    """Bytes of storage from the first to the last that a tensor spans."""
    return extent(spec["shape"], spec["stride"]) * getattr(torch, spec["dtype"]).itemsize


def extent(shape: list[int], stride: list[int]) -> int:
    """Number of elements of storage that a strided tensor spans."""
    if any(n == 0 for n in shape):
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def place(tensors: list[torch.Tensor], start: int) -> tuple[list[dict[str, Any]], int]:
    """Lay `tensors` out one after another from byte `start`; the specs and the end."""
    specs = []
    for tensor in tensors:
        shape, stride = list(tensor.shape), list(tensor.stride())
        specs.append(
            {
                "offset": start,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": shape,
                "stride": stride,
            }
        )
        start += extent(shape, stride) * tensor.element_size()
        start += -start % ALIGN
    return specs, start


def place_contiguous(tensors: list[torch.Tensor]) -> tuple[list[dict[str, Any]], int]:
    """As `place` from byte 0, of contiguous tensors of the same shapes."""
    like = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors]
    return place(like, 0)


def flatten(value: Any, tensors: list[torch.Tensor]) -> Any:
    """A JSON tree of `value`; its tensors are appended to `tensors`.

    Raises TypeError for anything but tensors, numbers, strings, None, lists and tuples.
    """
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"t": len(tensors) - 1}
    if isinstance(value, (list, tuple)):
        return {"l" if type(value) is list else "u": [flatten(v, tensors) for v in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"v": value}
    kind = type(value).__name__
    raise TypeError(
        f"a value of type {kind}, which is no tensor, number, text, None, list or tuple"
    )


def tensors_of(args: Any) -> list[torch.Tensor]:
    """The tensors among inputs, in the order of `flatten`."""
    tensors: list[torch.Tensor] = []
    flatten(list(args), tensors)
    return tensors


def unflatten(tree: Any, tensors: list[torch.Tensor]) -> Any:
    """The inverse of `flatten`."""
    if "t" in tree:
        return tensors[tree["t"]]
    if "v" in tree:
        return tree["v"]
    items = [unflatten(item, tensors) for item in tree.get("l", tree.get("u"))]
    return items if "l" in tree else tuple(items)


class _CudaBytes:
    """The array interface by which torch adopts memory that it did not allocate."""

    def __init__(self, pointer: int, size: int):
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * 64)]


def _driver() -> ctypes.CDLL:
    # The driver's library is always there on a CUDA machine, whichever runtime torch was built
    # with; torch must have made its context current first.
    torch.zeros(1, device="cuda")
    return ctypes.CDLL("libcuda.so.1")


def _ok(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what} failed with CUDA driver error {code}")


def _cuda_allocate(size: int) -> tuple[int, str]:
    driver, pointer, handle = _driver(), ctypes.c_uint64(), _IpcHandle()
    _ok(driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)), "cuMemAlloc")
    _ok(driver.cuIpcGetMemHandle(ctypes.byref(handle), pointer), "cuIpcGetMemHandle")
    return pointer.value, bytes(handle).hex()


def _cuda_open(handle: str) -> tuple[int, str]:
    driver, pointer = _driver(), ctypes.c_uint64()
    raw = _IpcHandle.from_buffer_copy(bytes.fromhex(handle))
    code = driver.cuIpcOpenMemHandle_v2(ctypes.byref(pointer), raw, ctypes.c_uint(1))
    _ok(code, "cuIpcOpenMemHandle")
    return pointer.value, handle
