"""GPU readings with a stand-in for NVIDIA's library; the mapping of CUDA_VISIBLE_DEVICES by CUDA's documented rules."""

import logging
import sys
from types import SimpleNamespace

import pytest

from mellow_ds.monitor.gpu import open_gpu_meter, physical_device
from mellow_ds.monitor.record import GpuReading

GIB = 1024**3


@pytest.mark.parametrize(
    ("visible", "index", "wanted"),
    [
        (None, 2, 2),
        ("2,3", 0, 2),
        ("2,3", 1, 3),
        (" 5 , 1 ", 1, 1),
        ("2,3", 2, None),
        ("", 0, None),
        ("-1", 0, None),
        ("1,-1,2", 0, 1),
        ("1,-1,2", 1, None),  # CUDA stops at the first entry that is no device
        ("GPU-8932f937,1", 0, "GPU-8932f937"),
        ("MIG-abc", 0, "MIG-abc"),
        ("NoDevFiles", 0, None),
    ],
)
def test_physical_device(visible: str | None, index: int, wanted: int | str | None) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert physical_device(index, environ) == wanted


class FakeNvml(SimpleNamespace):
    """Two devices of which the second, number 1, tells no power."""

    class NVMLError(Exception):
        """As the library's."""

    UUIDS = ("GPU-aaaa-1", "GPU-bbbb-2")

    def nvmlInit(self) -> None:
        if getattr(self, "broken", False):
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return self.UUIDS[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=(handle + 1) * GIB, total=80 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:  # noqa: ARG002
        return SimpleNamespace(gpu=97)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle == 1:
            raise self.NVMLError("Not Supported")
        return 312_500


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("mellow_ds"), "propagate", True)
    caplog.set_level(logging.INFO, "mellow_ds")
    return caplog


def test_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    meter = open_gpu_meter(0, {})
    assert meter is not None
    assert meter.read() == GpuReading(1.0, 80.0, 97.0, 312.5)


def test_a_field_that_the_device_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    meter = open_gpu_meter(0, {"CUDA_VISIBLE_DEVICES": "1,0"})
    assert meter is not None
    assert meter.read() == GpuReading(2.0, 80.0, 97.0, None)


def test_devices_by_uuid(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    meter = open_gpu_meter(0, {"CUDA_VISIBLE_DEVICES": "GPU-bb"})
    assert meter is not None
    assert meter.read().gpu_memory_used_gib == 2.0
    assert open_gpu_meter(0, {"CUDA_VISIBLE_DEVICES": "GPU-"}) is None
    assert "2 devices are called GPU-" in log.text


@pytest.mark.parametrize(
    ("module", "environ", "index", "reason"),
    [
        (None, {}, 0, "pynvml"),  # None in sys.modules: the import fails
        (FakeNvml(broken=True), {}, 0, "Driver Not Loaded"),
        (FakeNvml(), {}, 7, "Invalid Argument"),
        (FakeNvml(), {"CUDA_VISIBLE_DEVICES": "0"}, 1, "hides device 1"),
    ],
)
def test_absent_is_one_line(
    module: object,
    environ: dict[str, str],
    index: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert open_gpu_meter(index, environ) is None
    (record,) = log.records
    assert reason in record.getMessage()


def test_a_run_without_gpus_says_nothing(log: pytest.LogCaptureFixture) -> None:
    assert open_gpu_meter(None) is None
    assert not log.records


@pytest.mark.gpu
def test_real_device() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    meter = open_gpu_meter(0)
    assert meter is not None
    reading = meter.read()
    _, total = torch.cuda.mem_get_info(0)
    assert reading.gpu_memory_total_gib == pytest.approx(total / GIB, rel=0.05)
    assert reading.gpu_memory_used_gib is not None
    assert 0 < reading.gpu_memory_used_gib <= reading.gpu_memory_total_gib
