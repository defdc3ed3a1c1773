from __future__ import annotations

from typing import Any

import pytest

from localexit.bench.roofline import Machine, Part, parts, rooflines
from localexit.bench.shapes import Shape

SHAPE = Shape(num_tokens=1000, hidden_size=100, vocab_size=10_000)


def test_flops_and_bytes_by_hand() -> None:
    error, weight_grad, feedback = parts("dense", SHAPE)
    assert error.flops == weight_grad.flops == 2e9
    # h, W and the error, two bytes a number.
    assert error.num_bytes == 2 * (1e5 + 1e6 + 1e7)
    # The error and h are read, the fp32 sum read and written.
    assert weight_grad.num_bytes == 2 * (1e7 + 1e5) + 8 * 1e6
    assert feedback.flops == 2 * 1000 * 128 * (10_000 + 100)


def test_rules_with_a_third_product_have_it() -> None:
    flops = {
        name: sum(part.flops for part in parts(name, SHAPE)) for name in ("transport", "anchors", "mirror_sampled")
    }
    assert flops["transport"] == 6e9
    assert flops["mirror_sampled"] == 4e9 + 2 * 1000 * 33 * 100
    assert flops["anchors"] == 4e9 + 2 * 1000 * 128 * (10_000 + 100)


def test_a_part_takes_as_long_as_the_slower_of_both() -> None:
    machine = Machine(flops=1e9, bandwidth=1e6)
    assert Part(name="", flops=3e9, num_bytes=2e6).seconds(machine) == 3.0
    assert Part(name="", flops=1e9, num_bytes=2e6).seconds(machine) == 2.0
    assert Part(name="", flops=3e9, num_bytes=2e6).seconds(machine, flops=5e8) == 6.0


def content(device: str) -> dict[str, Any]:
    times = {"h @ W.T": 0.1, "dense step": 1.0, "dense autograd": 9.0}
    results = [{"name": name, "median_ms": ms} for name, ms in times.items()]
    return {"device": device, "shapes": {"here": {"shape": vars(SHAPE), "results": results}}}


def test_floors_and_the_gap_to_them() -> None:
    (found,) = rooflines(content("NVIDIA H100 80GB HBM3"))
    assert (found.name, found.measured_ms) == ("dense", 1.0)
    # 2 GFLOP in 0.1 ms: 20 TFLOP/s. All of it is products at that speed.
    by_products = (2e9 + 2e9 + 2 * 1000 * 128 * 10_100) / 20e12
    assert found.attainable_ms == pytest.approx(1e3 * by_products)
    assert found.promised_ms < found.attainable_ms
    assert found.gap_ms == pytest.approx(1.0 - found.attainable_ms)


def test_nothing_is_promised_for_a_device_without_a_data_sheet() -> None:
    assert rooflines(content("another")) == []
