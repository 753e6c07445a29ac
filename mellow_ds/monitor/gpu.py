"""What this rank's GPU is doing, by NVIDIA's management library (package nvidia-ml-py); nothing where there is none."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from mellow_ds.monitor.record import GpuReading

_GIB = 1024**3


def physical_device(cuda_index: int, environ: Mapping[str, str] | None = None) -> int | str | None:
    """The device that CUDA calls `cuda_index` in this process: its index on the host, or its UUID; None: hidden.

    CUDA numbers the devices that CUDA_VISIBLE_DEVICES lists, in that order, up to the first entry that is not one.
    On a host with GPUs of several models CUDA counts the fastest first and NVML by slot: set there
    CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    env = os.environ if environ is None else environ
    listed = env.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return cuda_index
    devices: list[int | str] = []
    for entry in (part.strip() for part in listed.split(",")):
        if entry.isdecimal():
            devices.append(int(entry))
        elif entry.startswith(("GPU-", "MIG-")):
            devices.append(entry)
        else:
            break
    return devices[cuda_index] if cuda_index < len(devices) else None


class GpuMeter:
    """Reads one GPU. Use `open_gpu_meter`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    def read(self) -> GpuReading:
        """The present reading; fields that the device does not tell (power under MIG) are None."""
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        rates = self._ask("nvmlDeviceGetUtilizationRates")
        power = self._ask("nvmlDeviceGetPowerUsage")
        return GpuReading(
            gpu_memory_used_gib=None if memory is None else memory.used / _GIB,
            gpu_memory_total_gib=None if memory is None else memory.total / _GIB,
            gpu_utilisation_percent=None if rates is None else float(rates.gpu),
            gpu_power_watts=None if power is None else power / 1000,  # the library says milliwatts
        )

    def _ask(self, name: str) -> Any:
        try:
            return getattr(self._nvml, name)(self._handle)
        except self._nvml.NVMLError:
            return None


def open_gpu_meter(cuda_index: int | None, environ: Mapping[str, str] | None = None) -> GpuMeter | None:
    """The meter of the device that CUDA calls `cuda_index` (None: no GPU is used); None where it cannot be read."""
    if cuda_index is None:
        return None
    logger = logging.getLogger("mellow_ds")
    device = physical_device(cuda_index, environ)
    try:
        import pynvml

        if device is None:
            raise LookupError(f"CUDA_VISIBLE_DEVICES hides device {cuda_index}")
        pynvml.nvmlInit()
        if isinstance(device, int):
            return GpuMeter(pynvml, pynvml.nvmlDeviceGetHandleByIndex(device))
        return GpuMeter(pynvml, _by_uuid(pynvml, device))
    except (ImportError, LookupError) as error:
        logger.info("GPU memory, utilisation and power are not recorded: %s", error)
    except Exception as error:  # NVMLError is known only where the package is
        logger.info("GPU memory, utilisation and power are not recorded: %s", error)
    return None


def _by_uuid(nvml: Any, uuid: str) -> Any:
    """CUDA takes the beginning of a UUID where it fits one device only; NVML wants it whole."""
    if uuid.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    fitting = [handle for handle in handles if nvml.nvmlDeviceGetUUID(handle).startswith(uuid)]
    if len(fitting) != 1:
        raise LookupError(f"{len(fitting)} devices are called {uuid}")
    return fitting[0]
