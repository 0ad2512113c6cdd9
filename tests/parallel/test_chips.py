"""What JAX calls devices, and their peaks."""

import jax
import pytest

from mmpo_jax.parallel.chips import CHIPS, KINDS, peak_flops


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
    ],
)
def test_peaks(kind, tera):
    assert peak_flops(kind) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "TPU v3", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GB200"])
def test_no_peak_is_made_up(kind):
    assert peak_flops(kind) is None


def test_these_devices_have_none():
    assert peak_flops(jax.devices()[0].device_kind) is None


def test_kinds_are_of_known_chips():
    assert {*KINDS.values()} == CHIPS.keys() - {"cpu"}
