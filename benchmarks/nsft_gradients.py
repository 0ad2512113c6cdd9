"""What nSFT's two terms ask of the start model on the picture world, beside SFT and DPO.

    python benchmarks/nsft_gradients.py --data runs/nsft/seed-0/data

Of the first batch of every method of benchmarks/nsft_results.py, whose data it takes: the loss of
each term per token (of DPO per pair), the norm of its gradient by what the recipes train, and the
cosine of that with the gradient of learning the true captions. Trains nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from nsft_results import METHODS
from objective_results import CONFIGS
from tried_rates import Method

from mmpo_jax.checkpoints.checkpoint import Checkpoint, load_start
from mmpo_jax.commands.train import training_data
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.pipeline import training_batches
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.files import load_recipe
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.training.examples import prepare_examples
from mmpo_jax.training.losses import make_loss, recipe_terms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="runs/nsft/seed-0/data", help="folder of one seed's data")
    options = parser.parse_args()
    mesh = make_mesh()
    print("| method | term | loss | norm of its gradient | cosine with the first |")
    print("|---|---|---|---|---|")
    first: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name, method in METHODS.items():
            if method.overrides:  # with KL: 0 at the start
                continue
            recipe = recipe_of(
                method, options.data, os.path.join(folder, method.recipe, method.data)
            )
            start = load_start(recipe.model, None, mesh, recipe.attention, recipe.template)
            for term, (loss, gradient) in enumerate(terms_of(recipe, start, mesh), start=1):
                first = gradient if first is None else first
                norms = np.linalg.norm(gradient), np.linalg.norm(first)
                cosine = gradient @ first / (norms[0] * norms[1])
                print(
                    f"| {name} | {term} | {loss:.4f} | {norms[0]:.3f} | {cosine:.2f} |", flush=True
                )


def recipe_of(method: Method, data: str, output: str) -> TrainRecipe:
    path = os.path.join(CONFIGS, f"{method.recipe}.yaml")
    own = os.path.join(data, f"{method.data}.jsonl")
    return load_recipe(TrainRecipe, path, [f"data.path={own}", f"output={output}"])


def terms_of(
    recipe: TrainRecipe, start: Checkpoint, mesh: jax.sharding.Mesh
) -> Iterator[tuple[float, np.ndarray]]:
    """(loss, gradient by the trained parameters as one vector) of every term of the objective."""
    training = recipe.training
    terms = recipe_terms(training)
    rows = training_data(recipe, start)
    examples = prepare_examples(
        start, rows.records, training, recipe.lengths, mesh, folder=recipe.output
    )
    batches = training_batches(
        examples,
        start.processor,
        recipe.lengths,
        seed=recipe.seed,
        epochs=1,
        batch_size=training.batch_size,
        micro_batch_size=training.batch_size,
    )
    batch = jax.tree.map(lambda x: x[0], next(iter(batches)).arrays)
    loss = make_loss(start.model, terms)

    def values(params):
        (sums,), _ = loss.sums(loss.forward(params, None, batch), batch, loss.state)
        return jnp.atleast_1d(sums.loss / jnp.maximum(sums.weight, 1))

    found, pull = jax.vjp(values, start.params)
    for place, value in enumerate(found):
        (gradient,) = pull(jnp.eye(len(found))[place])
        trained = [
            np.ravel(leaf)
            for path, leaf in sorted(flatten(gradient).items())
            if "language_model" in path and "/mlp/" in path
        ]
        yield float(value), np.concatenate(trained)


if __name__ == "__main__":
    main()
