"""Pretends a CUDA card to the CUDA build of torch, for fake tensors: shapes, and no values.

`start(card)` re-executes this program under stub libraries, and then replaces what would ask the
driver. After it FakeTensorMode takes device="cuda", and Triton compiles its kernels by ptxas for
the card's architecture and loads none of them: a list gets (kernel, bytes of shared memory).
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

# name, compute capability, processors, shared memory that one block of threads may ask for
A100 = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", major=8, minor=0, multi_processor_count=108,
                       shared_memory_per_block_optin=166_912)  # fmt: skip
H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
                       shared_memory_per_block_optin=232_448)  # fmt: skip
CARDS = {"a100": A100, "h100": H100}
ALIKE = {"total_memory": 85_000_000_000, "regs_per_multiprocessor": 65536, "warp_size": 32,
         "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024,
         "shared_memory_per_block": 49152, "L2_cache_size": 2**25, "clock_rate": 1_410_000,
         "memory_clock_rate": 1_593_000, "memory_bus_width": 5120, "gcnArchName": "",
         "uuid": "pretended"}  # fmt: skip

# c10::cuda::device_count: none while torch installs a guard that asks no driver, and then enough
COUNT = """#include <stdint.h>
static int8_t count = 0;
int8_t _ZN3c104cuda12device_countEv(void) { return count; }
void set_count(int n) { count = n; }
"""
# what Triton links against
DRIVER = """CtxGetCurrent CtxSetCurrent DeviceGet DeviceGetAttribute DevicePrimaryCtxRetain
FuncGetAttribute FuncSetAttribute FuncSetCacheConfig GetErrorString LaunchCooperativeKernel
LaunchKernel LinkAddData_v2 LinkComplete LinkCreate_v2 ModuleGetFunction ModuleLoad ModuleLoadData
ModuleLoadDataEx ModuleUnload OccupancyMaxActiveBlocksPerMultiprocessor PointerGetAttribute
TensorMapEncodeTiled"""
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
DRIVER = "".join(f"int cu{name}() {{ return {NO_DEVICE}; }}\n" for name in DRIVER.split())
DRIVER += """int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0; *active = 0; return 0; }\n"""


def start(card):
    """Pretends this card from here on -> (its properties, a list that compiled kernels fill)."""
    if "PRETENDED" not in os.environ:
        folder = tempfile.mkdtemp()
        for name, text in {"libcount.so": COUNT, "libcuda.so.1": DRIVER}.items():
            gcc = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", f"{folder}/{name}"]
            subprocess.run(gcc, input=text, text=True, check=True)
        env = {"PRETENDED": folder, "LD_LIBRARY_PATH": folder, "OMP_NUM_THREADS": "1"}
        env["LD_PRELOAD"] = f"{folder}/libcount.so"
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | env)
    properties = SimpleNamespace(**ALIKE | vars(CARDS[card]))
    _torch(properties)
    return properties, _triton(properties)


def _nothing(*args, **options):
    return None


def _zero(*args, **options):
    return 0


def _own(function):
    return lambda *args, **options: function(*args, **options)


class Stream:
    """Work is done in order: nothing waits."""

    cuda_stream = stream_id = device_index = 0

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def record_event(self, event=None):
        return Event()

    synchronize = wait_stream = wait_event = _nothing


class Event:
    def __init__(self, *args, **options):
        pass

    def query(self):
        return True

    record = wait = synchronize = _nothing


def _torch(properties):
    """Answers what torch asks of the device."""
    import torch
    import torch._dynamo.device_interface as interface
    import torch._subclasses.fake_tensor as fake
    import torch.cuda.random as random

    torch._C._ensureCUDADeviceGuardSet()
    ctypes.CDLL(os.environ["LD_PRELOAD"]).set_count(64)
    capability = (properties.major, properties.minor)
    cuda, true = torch.cuda, lambda *args, **options: True
    answers = {"is_available": true, "device_count": lambda: 8, "is_initialized": true,
               "get_device_properties": lambda device=None: properties,
               "get_device_capability": lambda device=None: capability,
               "get_device_name": lambda device=None: properties.name,
               "is_bf16_supported": true, "current_device": _zero, "Stream": Stream, "Event": Event,
               "current_stream": Stream, "default_stream": Stream, "stream": Stream,
               "_exchange_device": _zero, "_maybe_exchange_device": _zero}  # fmt: skip
    answers |= dict.fromkeys(("_lazy_init", "init", "set_device", "synchronize"), _nothing)
    for name, answer in answers.items():  # a function of its own each: Dynamo tells them apart
        setattr(cuda, name, answer if isinstance(answer, type) else _own(answer))
    cuda._initialized = True
    number = 10 * properties.major + properties.minor
    names = ("current_device", "exchange_device", "maybe_exchange_device")
    for owner in (interface.CudaInterface, interface.CudaInterface.Worker):
        for name in (*names, "set_device", "synchronize"):
            setattr(owner, name, staticmethod(_own(_zero if name in names else _nothing)))
        owner.get_device_properties = staticmethod(lambda device=None: properties)
    interface.CudaInterface.get_compute_capability = staticmethod(lambda device=None: number)
    interface.CudaInterface.is_available = staticmethod(lambda: True)
    interface.CudaInterface.device_count = staticmethod(lambda: 8)
    for module in (cuda, random):  # recomputation keeps the state of the random numbers
        module.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
        module.set_rng_state = _own(_nothing)
    for name in ("getCurrentRawStream", "getDevice", "exchangeDevice", "maybeExchangeDevice"):
        setattr(torch._C, f"_cuda_{name}", _own(_zero))
    torch._C._cuda_getDeviceCount, torch._C._cuda_setDevice = (lambda: 8), _own(_nothing)
    for name in ("set_device_index", "synchronize"):
        setattr(torch.accelerator, name, _own(_nothing))
    torch.accelerator.current_device_index = _own(_zero)
    fake.init_gpu_context = _own(_nothing)


def _triton(properties):
    """Gives Triton a driver that knows its target, and loads kernels to nothing."""
    import torch
    import torch._inductor.config as inductor
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.runtime.triton_helpers as helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    compiled, most = [], properties.shared_memory_per_block_optin

    class Utils:
        set_printf_fifo_size = unload_module = _nothing

        def get_device_properties(self, device):
            return {"max_shared_mem": most, "max_num_regs": 65536, "warpSize": 32,
                    "multiprocessor_count": properties.multi_processor_count,
                    "sm_clock_rate": properties.clock_rate, "mem_bus_width": 5120,
                    "mem_clock_rate": properties.memory_clock_rate}  # fmt: skip

        def load_binary(self, name, kernel, shared, device):
            compiled.append((name, shared))
            return (1, 1, 0, 0, 1024)  # module, function, registers, spills, threads

        def cuOccupancyMaxActiveClusters(self, *args):  # noqa: N802
            return 1

    class Driver:
        utils = Utils()
        set_current_device = get_empty_cache_for_benchmark = clear_cache = _nothing
        get_current_device = get_current_stream = _zero

        def launcher_cls(self, source, metadata):
            return _nothing

        def get_current_target(self):
            return GPUTarget("cuda", 10 * properties.major + properties.minor, 32)

        def get_device_capability(self, device=0):
            return properties.major, properties.minor

        def get_active_torch_device(self):
            return torch.device("cuda", 0)

        def get_device_interface(self):
            return torch.cuda

        def get_benchmarker(self):
            return lambda function, quantiles=None, **options: [1.0, 1.0, 1.0]

        def is_active(self):
            return True

        def map_python_to_cpp_type(self, kind):
            return kind

    driver.set_active(Driver())
    helpers.set_driver_to_gpu = joint_graph.lazy_init = _nothing
    settings = {"compile_threads": 1, "joint_graph_constant_folding": False}
    settings |= {"force_disable_caches": True}
    settings |= dict.fromkeys(("use_static_cuda_launcher", "use_static_triton_launcher"), False)
    for name, value in settings.items():
        if hasattr(inductor, name):
            setattr(inductor, name, value)
    return compiled
