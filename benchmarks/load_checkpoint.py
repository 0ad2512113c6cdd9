"""Loading a sharded bfloat16 checkpoint in the shape of a published model: memory and time.

Random weights are written in shards of 5 GB, then loaded in fresh processes, with files that are
not in the system's cache: by mmpo_jax onto the CPU device, and by `safetensors` into NumPy arrays.

    python benchmarks/load_checkpoint.py               # LLaVA-1.5-7B, 14.1 GB of disk
    python benchmarks/load_checkpoint.py --layers 2
    python benchmarks/load_checkpoint.py --model Qwen3-30B-A3B --layers 6 --mesh --save

With `--mesh` ours are split over eight simulated devices by fsdp, tensor, and of a mixture expert;
with `--save` they are written again, into as much disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

GOAL = 1.15
"""Peak resident memory / weights, at most."""


def make_checkpoint(folder: str, name: str, layers: int | None, max_shard_bytes: int) -> int:
    """Writes the checkpoint tensor by tensor; returns the bytes of its weights."""
    import ml_dtypes
    import numpy as np
    from published import PUBLISHED

    from mmpo_jax.checkpoints.configs import load_config
    from mmpo_jax.checkpoints.huggingface import new_tensors
    from mmpo_jax.checkpoints.safetensors_writing import split_into_files, write_files
    from mmpo_jax.models.model import Model

    config = PUBLISHED[name].config()
    text = config.get_text_config()
    text.num_hidden_layers = layers or text.num_hidden_layers
    config.save_pretrained(folder)
    model = Model.create(load_config(folder))
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16)
        return (bits & 0xBFFF).view(ml_dtypes.bfloat16).reshape(shape)  # below 2, so finite

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    tensors = [
        dataclasses.replace(tensor, dtype=bfloat16, fetch=lambda shape=tensor.shape: draw(shape))
        for tensor in new_tensors(model.abstract_params(), model)
    ]
    write_files(folder, split_into_files(tensors, max_shard_bytes))
    return sum(tensor.num_bytes for tensor in tensors)


def mmpo_loader(folder: str, save: str | None) -> Callable[[], int]:
    """Onto the devices, and to the disk again if asked for; returns the bytes loaded."""
    import jax

    from mmpo_jax.checkpoints.configs import load_config
    from mmpo_jax.checkpoints.huggingface import load_params, save_model
    from mmpo_jax.core.trees import flatten
    from mmpo_jax.models.model import Model
    from mmpo_jax.parallel.mesh import make_mesh, placed_shapes

    model = Model.create(load_config(folder))
    expert = 2 if model.config.decoder.experts else 1
    sizes = {} if jax.device_count() == 1 else {"expert": expert, "tensor": 2}
    places = placed_shapes(model.abstract_params(), model.rules, make_mesh(**sizes))

    def load() -> int:
        params = load_params(folder, model, places)
        if save is not None:
            save_model(save, model, params, folder)
        return sum(leaf.nbytes for leaf in flatten(params).values())

    return load


def safetensors_loader(folder: str, save: str | None) -> Callable[[], int]:
    """Into NumPy arrays, one file after another; returns the bytes loaded."""
    import safetensors.numpy

    from mmpo_jax.checkpoints.safetensors_files import weight_files

    def load() -> int:
        tensors: dict = {}
        for file in weight_files(folder):
            tensors |= safetensors.numpy.load_file(file)
        return sum(tensor.nbytes for tensor in tensors.values())

    return load


LOADERS = {"mmpo_jax": mmpo_loader, "safetensors": safetensors_loader}


def measure(name: str, folder: str, save: str | None) -> dict[str, float]:
    """Loads in this process. What imports take is in the memory, not in the time."""
    load = LOADERS[name](folder, save)
    started, used = time.perf_counter(), time.process_time()
    loaded = load()
    seconds, used = time.perf_counter() - started, time.process_time() - used
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {"seconds": seconds, "processor": used, "peak": peak * 1024, "loaded": loaded}


def measure_fresh(name: str, folder: str, save: str | None, devices: int) -> dict[str, float]:
    """`measure` in a process of its own, with the files out of the system's cache."""
    for entry in os.scandir(folder):
        descriptor = os.open(entry.path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    command = [sys.executable, __file__, "--measure", name, "--folder", folder]
    command += [] if save is None else ["--saved", save]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="LLaVA-1.5-7B", help="of benchmarks/published.py")
    parser.add_argument("--layers", type=int, help="of the decoder; all by default")
    parser.add_argument("--mesh", action="store_true", help="over eight simulated devices")
    parser.add_argument("--save", action="store_true", help="also writes what was loaded")
    parser.add_argument("--alone", action="store_true", help="without the comparison")
    parser.add_argument("--max-shard-bytes", type=int, default=5_000_000_000)
    parser.add_argument("--folder", help="where the files go for a while; default: TMPDIR")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--measure", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--saved", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.saved)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as parent:
        folder = os.path.join(parent, "model")
        os.mkdir(folder)
        save = os.path.join(parent, "saved") if options.save else None
        weights = make_checkpoint(folder, options.model, options.layers, options.max_shard_bytes)
        files = sum(name.endswith(".safetensors") for name in os.listdir(folder))
        print(f"{weights / 1e9:.2f} GB of bfloat16 in {files} files")
        devices = 8 if options.mesh else 1
        names = list(LOADERS)[:1] if options.alone else LOADERS
        results = {name: measure_fresh(name, folder, save, devices) for name in names}
    assert all(result["loaded"] == weights for result in results.values())
    print(f"{'':12s}  {'seconds':>8s}  {'GB/s':>6s}  processor s  {'peak GB':>8s}  peak / weights")
    for name, result in results.items():
        rate, share = weights / 1e9 / result["seconds"], result["peak"] / weights
        print(
            f"{name:12s}  {result['seconds']:8.2f}  {rate:6.2f}  {result['processor']:11.2f}  "
            f"{result['peak'] / 1e9:8.2f}  {share:.3f}"
        )
    print(f"goal: mmpo_jax's peak / weights at most {GOAL}, at 7B; JAX itself takes some 0.4 GB")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"weights": weights, **results}, file, indent=1)


if __name__ == "__main__":
    main()
