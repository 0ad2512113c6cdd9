"""The gated delta rule in chunks against token by token: seconds and the largest difference.

    python benchmarks/delta_rule.py --tokens 1024

prints a Markdown table of the forward pass, and of the forward and the backward pass.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmpo_jax.models.delta_rule import delta_step, gated_delta_rule, unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--value-heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    arrays = draw(
        options.rows, options.tokens, options.key_heads, options.value_heads, options.width
    )
    print("| pass | token by token, s | in chunks, s | ratio | largest difference |")
    print("| --- | --- | --- | --- | --- |")
    rules = by_tokens, gated_delta_rule
    for name, passes in {"forward": rules, "forward and backward": map(gradients, rules)}.items():
        slow, fast = map(jax.jit, passes)
        expected, actual = slow(*arrays), fast(*arrays)
        error = max(jax.tree.leaves(jax.tree.map(difference, expected, actual)))
        slow_time, fast_time = times((slow, fast), arrays, options.repeats)
        ratio = slow_time / fast_time
        print(f"| {name} | {slow_time:.4f} | {fast_time:.4f} | {ratio:.1f} | {error:.1e} |")


def draw(rows: int, tokens: int, keys: int, values: int, width: int) -> tuple[jax.Array, ...]:
    """Arguments of `gated_delta_rule`."""
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, rows, tokens, keys, width))
    value = rng.normal(size=(rows, tokens, values, width))
    log_decay = -rng.exponential(size=(rows, tokens, values)) * rng.uniform(0, 1, values)
    strength = rng.uniform(size=(rows, tokens, values))
    state = 0.1 * rng.normal(size=(rows, values, width, width))
    arrays = (query, key, value, log_decay, strength, state)
    query, key, *others = (jnp.asarray(x, jnp.float32) for x in arrays)
    return unit(query), unit(key), *others


def by_tokens(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    strength: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`gated_delta_rule`, a token after the other."""

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        out, state = delta_step(*token, state)
        return state, out

    tokens = (x.swapaxes(0, 1) for x in (query, key, value, log_decay, strength))
    state, out = jax.lax.scan(step, state, tuple(tokens))
    return out.swapaxes(0, 1), state


def gradients(rule: Callable) -> Callable:
    """The gradients by all arguments of a sum that all results are in."""

    def total(*arrays: jax.Array) -> jax.Array:
        return sum(jnp.sum(jnp.sin(x)) for x in rule(*arrays))

    return jax.grad(total, argnums=tuple(range(6)))


def difference(expected: jax.Array, actual: jax.Array) -> float:
    """The largest difference, against the largest number."""
    return float(jnp.abs(expected - actual).max() / jnp.abs(expected).max())


def times(functions: tuple[Callable, ...], arguments: Any, repeats: int) -> list[float]:
    """The least seconds of each, in turns."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for number, function in enumerate(functions):
            started = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            best[number] = min(best[number], time.perf_counter() - started)
    return best


if __name__ == "__main__":
    main()
