"""Batches of sampled responses: contexts of their prompts, what a teacher sees, and fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.data.contexts import OtherImage, changed_images
from mmpo_jax.data.examples import Example
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.train_batch import HostBatch, batch_maker
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.model import Params
from mmpo_jax.objectives.terms import rows_read
from mmpo_jax.parallel.mesh import batch_share, gathered, put_batch
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.training import Training
from mmpo_jax.scoring.log_probs import score_batch
from mmpo_jax.training.losses import contexts_of, recipe_terms
from mmpo_jax.training.teacher import LoadedTeacher


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Sizes of a batch, over all devices."""

    prompts: int
    micro_batch: int
    """Prompts at a time."""
    lengths: Lengths


class RolloutBatches:
    """Makes the batches of one update each."""

    def __init__(
        self,
        start: Checkpoint,
        config: Training,
        rollout: Rollout,
        sizes: BatchSizes,
        mesh: Mesh,
        teacher: LoadedTeacher | None,
        seed: int,
    ):
        """
        Args:
          start: the architecture and what belongs to it.
          config: the recipe's training section.
          rollout: its section of samples.
          sizes: of a batch.
          mesh: the devices.
          teacher: who is shown the responses too, if anybody.
          seed: of changed images.
        """
        self.start, self.config, self.rollout = start, config, rollout
        self.sizes, self.mesh, self.teacher, self.seed = sizes, mesh, teacher, seed
        self.share, self.contexts = batch_share(mesh), contexts_of(config)
        self.rows = rows_read(recipe_terms(config))

    def make(self, records: Sequence[TokenizedRecord], step: int) -> HostBatch:
        """The batch of prompts with their responses, at most `BatchSizes.prompts` of them.

        Args:
          records: the prompts.
          step: of the training, by which images are changed.
        """
        examples = [
            Example(self._contexts(record, step), {}, names=self.contexts) for record in records
        ]
        sizes = self.sizes
        make = batch_maker(
            examples,
            self.start.processor,
            sizes.lengths,
            sizes.prompts,
            sizes.micro_batch,
            share=self.share,
        )
        host = make(list(range(len(examples))))
        if self.teacher is None:
            return host
        seen = self.teacher.batch(
            records, sizes.lengths, sizes.prompts, sizes.micro_batch, self.share
        )
        shown = seen.arrays.prompts
        assert isinstance(shown, Batch)  # no rollout is packed
        arrays = dataclasses.replace(host.arrays, teacher=shown)
        return dataclasses.replace(host, arrays=arrays, taught=seen.amounts)

    def _contexts(self, record: TokenizedRecord, step: int) -> tuple[TokenizedRecord, ...]:
        """The prompt, and that with changed images where objectives read one."""
        kind = self.rows.other_image
        if kind is None:
            return (record,)
        assert kind != "data"
        seed = int(fingerprint_json([self.seed, step])[:15], 16)
        other = OtherImage(kind, self.rows.noise_step, seed, self.rows.mask_share)
        return record, changed_images(record, other)

    def log_probs(self, params: Params, host: HostBatch) -> Float[np.ndarray, "N S T"]:
        """float32[N, S, T] of the responses under some parameters, with the temperature of the
        samples; of all rows of the batch, those of other processes too."""
        prompts, found = host.arrays.prompts, []
        for i in range(len(prompts.weights)):
            main = jax.tree.map(lambda leaf, i=i: leaf[i][:: len(self.contexts)], prompts)
            with jax.set_mesh(self.mesh):
                log_probs = score_batch(
                    self.start.model,
                    params,
                    put_batch(main, self.mesh),
                    self.config.compute_dtype,
                    per_token=True,
                    temperature=self.rollout.temperature,
                )
                found.append(np.asarray(gathered(log_probs, self.mesh)))
        return np.concatenate(found)

    def with_field(self, host: HostBatch, name: str, values: np.ndarray) -> HostBatch:
        """The batch with a further field, [n, S] or [n, S, T] of its first n prompts."""
        fields = {**host.arrays.fields, name: self._placed(values)}
        arrays = dataclasses.replace(host.arrays, fields=fields)
        return dataclasses.replace(host, arrays=arrays)

    def _placed(self, values: np.ndarray) -> Any:
        """float32[M, ...] of M micro-batches, this process's own rows; 0 where there is no
        prompt."""
        whole = np.zeros((self.sizes.prompts, *values.shape[1:]), np.float32)
        whole[: len(values)] = values
        parts = whole.reshape(-1, self.sizes.micro_batch, *values.shape[1:])
        return np.stack([np.stack(self.share.of([*part])) for part in parts])
