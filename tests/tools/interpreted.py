"""Runs what inductor compiles for a pretended card (pretend.py): on CPU tensors, interpreted.

Triton interprets its kernels where TRITON_INTERPRET is 1 before it is imported, block for block as
a card would run them, with numpy. Fake tensors are compiled for; behind each is a real one.
"""

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.runtime.triton_compat import libdevice
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

DOT = triton_interpreter.InterpreterBuilder.create_dot


def mend():
    """Lets the interpreter compute in bfloat16, which it has as integers of 16 bits."""
    triton_interpreter.InterpreterBuilder.create_dot = _dot
    triton_interpreter._convert_float = _convert
    # it has no functions of CUDA's; its own come while a kernel runs
    libdevice.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
    libdevice.exp = lambda x: tl.exp(x)
    libdevice.rsqrt, libdevice.erf = (lambda x: tl.rsqrt(x)), (lambda x: tl.erf(x))
    torch._C._dynamo.guards._empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cpu


def _dot(self, a, b, *rest):
    """Of the numbers; by itself it multiplies the integers."""
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return DOT(self, a, b, *rest)


def _convert(values, source, target, rounding):
    """Between fp32 and bfloat16, its upper half: to the nearest, as cards do; not cut off."""
    if (source, target) == (tl.bfloat16, tl.float32):
        return values.astype(np.uint32) << 16
    assert (source, target) == (tl.float32, tl.bfloat16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


class Shadows:
    """Real CPU tensors behind fake ones of the pretended card, by storage."""

    def __init__(self):
        self.mode, self.real, self.fakes = FakeTensorMode(allow_non_fake_inputs=True), {}, []

    def put(self, fake, value):
        """Lays a real tensor of the same strides behind a fake one."""
        if isinstance(fake, torch.Tensor):
            assert (fake.shape, fake.stride()) == (value.shape, value.stride())
            self.real[fake.untyped_storage()._cdata] = value
            self.fakes.append(fake)  # the next one must not get its address

    def fake(self, value):
        """The fake tensor of a real one."""
        with self.mode:
            fake = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="cuda"
            )
        self.put(fake, value.detach())
        return fake

    def value(self, fake):
        """What is behind a fake tensor; views of one storage are views of one."""
        if not isinstance(fake, torch.Tensor):
            return fake
        base = self.real[fake.untyped_storage()._cdata]
        return base.as_strided(fake.shape, fake.stride(), fake.storage_offset())

    def backend(self, graph, inputs):
        """A backend of torch.compile: inductor's code runs on what is behind its inputs."""
        return compile_fx(graph, inputs, inner_compile=self._inner)

    def _inner(self, graph, inputs, **options):
        compiled = compile_fx_inner(graph, inputs, **options)

        def run(*fakes):
            with unset_fake_temporarily():
                values = compiled([self.value(fake) for fake in fakes])
            outputs = graph.forward(*fakes)
            for fake, value in zip(outputs, values, strict=True):
                self.put(fake, value)
            return outputs

        return make_boxed_func(run)
