"""What a candidate's own process tells about it, where that needs neither a judge nor a device."""

import pytest

from ttkit.verify.watch import idle_kernels, kernels_defined

TORCH = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)"


def test_kernels_of_a_source_are_found_by_name():
    source = """
__global__ void plain(float *x) {}
__global__ __launch_bounds__(256) void bounded(float *x) {}
__global__ void __launch_bounds__(256, 2) bounded_later(float *x) {}
__device__ void helper(float *x) {}
"""
    assert kernels_defined(source, "candidate") == {"plain", "bounded", "bounded_later"}


@pytest.mark.parametrize(
    ("defined", "ran", "idle"),
    [
        ({"sines"}, [TORCH], ["sines"]),
        ({"sines"}, [TORCH, "sines(float const*, float*, int)"], []),
        ({"sines"}, ["(anonymous namespace)::sines<float>(float*)"], []),
        ({"sines"}, ["sines_kernel_0d1d2d"], ["sines"]),
        # Named like a part of torch's own kernels, or exactly like one of them.
        ({"kernel"}, [TORCH], ["kernel"]),
        ({"vectorized_elementwise_kernel"}, [TORCH], ["vectorized_elementwise_kernel"]),
        ({"one", "two"}, [TORCH, "two(float*)"], []),
        # A profiler that sees nothing at all says nothing.
        ({"sines"}, [], []),
    ],
)
def test_a_kernel_is_idle_when_no_kernel_of_that_name_ran(defined, ran, idle):
    assert idle_kernels(defined, ran) == idle
