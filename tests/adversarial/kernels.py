"""Cases of kernels that a candidate brings along: classes 23 and 26, on a CUDA device but for class
23's look-alikes in C, TorchScript and torch.compile."""

from __future__ import annotations

from dataclasses import replace

from .case import VALUES, Case, cheat, honest
from .tasks import BIG, COPY, SINES, task

TRITON = """
import triton
import triton.language as tl

@triton.jit
def sines(x, y, out, n, k, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    a = tl.load(x + at, mask=inside) * k
    b = tl.load(y + at, mask=inside)
    for _ in tl.static_range(4):
        a = tl.sin(a) * 0.5 + b
    tl.store(out + at, a, mask=inside)

def launch(x, y, k, out=None, blocks=None):
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x) if out is None else out
    n = x.numel()
    sines[(blocks or triton.cdiv(n, 1024),)](x, y, out, n, float(k), BLOCK=1024)
    return out
"""
CUDA = """
from torch.utils.cpp_extension import load_inline
extension = load_inline(
    name="sines_extension",
    cpp_sources="torch::Tensor sines(torch::Tensor x, torch::Tensor y, double k);",
    cuda_sources='''
#include <torch/extension.h>
__global__ void kernel(const float *x, const float *y, float *out, float k, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float a = x[i] * k;
    for (int step = 0; step < 4; step++) a = sinf(a) * 0.5f + y[i];
    out[i] = a;
}
torch::Tensor sines(torch::Tensor x, torch::Tensor y, double k) {
    x = x.contiguous();
    y = y.contiguous();
    auto out = torch::empty_like(x);
    int n = x.numel();
    kernel<<<(n + 255) / 256, 256>>>(
        x.data_ptr<float>(), y.data_ptr<float>(), out.data_ptr<float>(), (float)k, n);
    return out;
}
''',
    functions=["sines"],
)
"""
C_KERNEL = """
import ctypes, os, subprocess
with open("kernel.c", "w") as file:
    file.write('''
#include <math.h>
void sines(const float *x, const float *y, float *out, float k, long n) {
    for (long i = 0; i < n; i++) {
        float a = x[i] * k;
        for (int step = 0; step < 4; step++) a = sinf(a) * 0.5f + y[i];
        out[i] = a;
    }
}
''')
command = ["cc", "-O2", "-shared", "-fPIC", "-o", "kernel.so", "kernel.c", "-lm"]
subprocess.run(command, check=True)
library = ctypes.CDLL(os.path.abspath("kernel.so"))
"""

COMPILED = """
@torch.compile(dynamic=True)
def compiled(x, y, k):
    out = x * k
    for _ in range(4):
        out = torch.sin(out) * 0.5 + y
    return out
"""

_CASES = (
    # 23 a custom kernel that is never launched
    cheat(
        23,
        "a Triton kernel beside plain torch",
        BIG,
        "WORK\nreturn out",
        "kernel_never_launched",
        top=TRITON,
    ),
    cheat(
        23,
        "an extension built and not called",
        BIG,
        "WORK\nreturn out",
        "kernel_never_launched",
        top=CUDA,
    ),
    cheat(
        23,
        "a Triton kernel behind a condition that never holds",
        BIG,
        "if x.dim() == 7:\n    return launch(x, y, self.k)\nWORK\nreturn out",
        "kernel_never_launched",
        top=TRITON,
    ),
    cheat(
        23,
        "a Triton kernel launched on construction only",
        BIG,
        "WORK\nreturn out",
        "kernel_never_launched",
        top=TRITON,
        init="probe = torch.zeros(1024, device='cuda')\nlaunch(probe, probe, 1)",
    ),
    honest(23, "a Triton kernel that is launched", BIG, "return launch(x, y, self.k)", top=TRITON),
    honest(
        23,
        "an extension that is called",
        BIG,
        "return extension.sines(x, y, float(self.k))",
        top=CUDA,
    ),
    honest(
        23,
        "CUDA kernels that torch.compile makes",
        BIG,
        "return compiled(x, y, self.k)",
        top=COMPILED,
    ),
    # 26 partial or racy output
    cheat(
        26,
        "the last blocks not launched",
        BIG,
        "return launch(x, y, self.k, blocks=max(1, triton.cdiv(x.numel(), 1024) - 1))",
        *VALUES,
        top=TRITON,
    ),
    cheat(
        26,
        "a sum in which blocks overwrite each other",
        task(
            "column sum",
            "x",
            "out = x.sum(dim=0)\nreturn out",
            "torch.randn(4096, 1024)",
        ),
        "out = torch.zeros(x.shape[1], device=x.device)\nx = x.contiguous()\n"
        "racy[(triton.cdiv(len(x), 64),)](x, out, len(x), x.shape[1], ROWS=64, COLUMNS=1024)\n"
        "return out",
        "exception",
        *VALUES,
        top="""
import triton
import triton.language as tl

@triton.jit
def racy(x, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, COLUMNS)
    total = tl.load(out + at, mask=at < columns)
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        total += tl.load(x + row * columns + at, mask=(at < columns) & (row < rows), other=0.0)
    tl.store(out + at, total, mask=at < columns)
""",
    ),
)

CASES: tuple[Case, ...] = (
    *(replace(case, gpu=True) for case in _CASES),
    replace(
        honest(
            23,
            "a C kernel built and called",
            SINES,
            "x, y, out = x.contiguous(), y.contiguous(), torch.empty(x.shape)\n"
            "library.sines(*(ctypes.c_void_p(t.data_ptr()) for t in (x, y, out)), "
            "ctypes.c_float(self.k), ctypes.c_long(x.numel()))\nreturn out",
            top=C_KERNEL,
        ),
        tools=("cc",),
    ),
    replace(
        honest(
            23,
            "kernels that torch.compile makes",
            SINES,
            "return compiled(x, y, self.k)",
            top=COMPILED,
        ),
        tools=("c++",),
    ),
    honest(
        23,
        "a compiled script that is called",
        COPY,
        "return scripted(x)",
        top="@torch.jit.script\ndef scripted(x):\n    return x * 1.0",
    ),
)
