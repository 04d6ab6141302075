import subprocess
import sys

import pytest

from eellm.metrics.speed import Speedometer, peak_memory_gb


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_lap_leaves_out_pauses_and_counts_per_process():
    clock = Clock()
    speed = Speedometer(flops_per_token=2e9, world_size=4, clock=clock)
    clock.now += 5.0
    speed.restart()
    clock.now += 3.0
    with speed.paused():
        clock.now += 50.0
    clock.now += 1.0
    speed.step(tokens=500)
    speed.step(tokens=1500)
    assert speed.lap() == pytest.approx({"train/step_time": 2.0, "train/tokens_per_second": 500.0, "train/tflops": 0.25})
    clock.now += 1.0
    speed.step(tokens=100)
    assert speed.lap()["train/tokens_per_second"] == pytest.approx(100.0)


def test_the_clock_is_read_after_the_device_has_finished():
    clock = Clock()

    def queued_work_ends():
        clock.now += 2.0

    speed = Speedometer(1.0, 1, synchronise=queued_work_ends, clock=clock)
    speed.step(10)
    assert speed.lap()["train/step_time"] == pytest.approx(2.0)


def test_peak_memory_sees_what_a_process_held_for_a_moment():
    code = (
        "from eellm.metrics.speed import peak_memory_gb as peak; import sys\n"
        "before = peak('cpu'); block = bytearray(300_000_000); block[::4096] = block[::4096]; del block\n"
        "print(peak('cpu') - before); assert 'torch' not in sys.modules"
    )
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.28 < grown < 0.35
    assert peak_memory_gb("cpu") > 0.01
