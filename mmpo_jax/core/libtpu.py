"""What libtpu, TPUs' compiler and driver, reads from the environment where there is no TPU."""

from __future__ import annotations

import glob
import importlib.util
import os

NOWHERE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What keeps libtpu from locking a TPU, and from looking for one on the network."""

DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
"""Of TPUs, up to v4 and from v5e on."""


SAYING = ("JAX_PLATFORMS", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
"""Variables by which somebody says where computing is done."""


def quiet_libtpu() -> None:
    """Keeps an installed libtpu from telling at length that this machine has no TPU. JAX asks it
    for devices all the same, finds none and takes others.

    Nothing is changed where there is a TPU, or where the environment says what there is.
    """
    if any(name in os.environ for name in SAYING) or any(map(glob.glob, DEVICE_FILES)):
        return
    if importlib.util.find_spec("libtpu") is not None:
        os.environ.update(NOWHERE)
