"""Checkpoints by the names that recipes give them: Hugging Face folder, Orbax run, adapter, or
built-in."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection

import jax
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoints.below import Below
from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.checkpoints.folders import is_on_hub
from mmpo_jax.checkpoints.locations import Location, fingerprint_location, locate
from mmpo_jax.checkpoints.safetensors_files import stored_dtypes
from mmpo_jax.checkpoints.steps import checkpoint_shapes
from mmpo_jax.checkpoints.weights import (
    check_quantization,
    load_model_config,
    load_weights,
    quantized_base,
)
from mmpo_jax.core import progress
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.core.processes import check_same
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.data.processor import Processor
from mmpo_jax.models.config import ModelConfig, ModelError
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.quantized import Quantization
from mmpo_jax.models.quantized_base import quantize_base
from mmpo_jax.models.reward_head import new_head
from mmpo_jax.parallel.mesh import put_params

log = logging.getLogger(__name__)

ChangeConfig = Callable[[ModelConfig], ModelConfig]
"""The config that is wanted instead of that of the files."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """What parameters are made of: the files of a checkpoint, or a seed."""

    location: Location
    random_seed: int | None = None
    """Seed of new weights for the config of the location; None for those of its files."""
    head_seed: int | None = None
    """Seed of a new reward head on top of these weights; None where the files have the head."""

    def fingerprint(self, config: ModelConfig) -> str:
        """Digest of all files, or of seed and config, where weights that lie there do not matter.

        Raises:
          ModelError, DataError: naming the file that is missing or cannot be read.
        """
        if self.random_seed is None:
            files = fingerprint_location(self.location)
            if self.head_seed is None:
                return files
            return fingerprint_json([files, repr(config.reward_head), self.head_seed])
        fingerprint = fingerprint_json(["random", self.random_seed, dataclasses.asdict(config)])
        check_same(f"{self.location.base}: the config", lambda: fingerprint)
        return fingerprint

    def load(
        self,
        model: Model,
        mesh: Mesh | None,
        dtype: str | None = None,
        quantization: Quantization | None = None,
    ) -> Params:
        """The parameters, on the mesh or as NumPy arrays on the host; see `load_weights`. New
        weights and those under a new head have no other dtype."""
        if self.random_seed is None:
            with progress.doing(f"loading {self.location.weights}"):
                if self.head_seed is None:
                    return load_weights(self.location, model, mesh, dtype, quantization)
                check_quantization(self.location, quantization, merged=True)
                params = self._with_new_head(model, mesh)
        else:
            with progress.doing("making random weights"):
                params = model.init(self.random_seed)
            params = params if mesh is None else put_params(params, model.rules, mesh)
        return params if quantization is None else quantize_base(params, model, quantization)

    def is_cast_to(self, dtype: str) -> bool:
        """Whether reading the parameters in a dtype changes any; runs and merged adapters are
        float32."""
        if self.random_seed is not None or self.head_seed is not None:
            return False
        if self.location.is_orbax or self.location.adapters:
            return dtype != "float32"
        return any(found != dtype for found in stored_dtypes(self.location.weights))

    def _with_new_head(self, model: Model, mesh: Mesh | None) -> Params:
        assert self.head_seed is not None
        params = flatten(load_weights(self.location, model, mesh))
        head = unflatten(jax.tree.map(np.asarray, new_head(model.config, self.head_seed)))
        if mesh is not None:
            head = put_params(head, model.rules, mesh)
        return unflatten({**params, **flatten(head)})


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model with its processor and parameters."""

    model: Model
    processor: Processor
    params: Params
    """Parameters on a mesh, or NumPy arrays on the host."""
    fingerprint: str = ""
    """Digest of weights, config, tokenizer and processor; of seed and config where weights are
    random."""
    folder: str = ""
    hub_id: str | None = None
    """The name that a recipe gave it, if that is one of the hub's."""
    origin: Origin | None = None
    """Origin of the parameters; None where no file has them."""
    dtype: str | None = None
    """What the parameters are cast to when they are read; None where they are as the files have
    them."""
    quantization: Quantization | None = None
    """What the decoder's kernels are quantised to when they are read, if they are."""

    @property
    def below(self) -> Below | None:
        """What adapters of a training from here are of, where its kernels are quantised: of a run
        that was trained above such a base the same one."""
        if self.quantization is None:
            return None
        known = None if self.origin is None else self.origin.location.below
        if known is not None:
            return known[0]
        return Below(self.hub_id or self.folder, self.fingerprint, self.quantization)

    @property
    def quantized_base(self) -> Quantization | None:
        """The integers that the kernels of a training from here are, or lie near to: see
        `weights.quantized_base`."""
        if self.quantization is not None or self.origin is None:
            return self.quantization
        return quantized_base(self.origin.location)

    def placed(self, mesh: Mesh) -> Checkpoint:
        """The checkpoint with its parameters on a mesh, by the model's rules."""
        params = put_params(self.params, self.model.rules, mesh)
        return dataclasses.replace(self, params=params)

    def release(self, paths: Collection[str] | None = None) -> None:
        """Takes parameters out of the tree, for everyone who holds this checkpoint: the devices
        have their memory back where nobody else holds the arrays. `reloaded` has them again, and
        `restore` gives them to all who hold it.

        Args:
          paths: of the parameters; None for all.
        """
        for path in flatten(self.params) if paths is None else paths:
            *parents, name = path.split("/")
            node = self.params
            for parent in parents:
                node = node.get(parent, {})
            node.pop(name, None)

    def restore(self, mesh: Mesh) -> None:
        """Puts released parameters back, for everyone who holds this checkpoint.

        Raises:
          ModelError, CheckpointError: as `reloaded`.
        """
        params = self.reloaded(mesh).params
        if params is not self.params:
            self.params.clear()
            self.params.update(params)

    def reloaded(self, mesh: Mesh) -> Checkpoint:
        """The checkpoint with all of its parameters, read again where some were released.

        Raises:
          ModelError, CheckpointError: they are no more what they were, or cannot be read.
        """
        if flatten(self.params).keys() >= self._paths():
            return self
        if self.origin is None:
            raise ModelError("the parameters were released, and no file has them")
        if self.origin.fingerprint(self.model.config) != self.fingerprint:
            raise ModelError(f"{self.folder}: is no more what was loaded from it")
        params = self.origin.load(self.model, mesh, self.dtype, self.quantization)
        return dataclasses.replace(self, params=params)

    def _paths(self) -> set[str]:
        """Paths of all parameters, those of adapters on a quantised base too."""
        paths = set(flatten(self.model.abstract_params()))
        if self.quantization is None or self.origin is None or self.origin.location.below is None:
            return paths
        return paths | checkpoint_shapes(self.origin.location.weights).keys()

    def moved(self, mesh: Mesh, quantization: Quantization | None = None) -> Checkpoint:
        """The checkpoint with all of its parameters on a mesh, as the files have them or quantised;
        read again where they lie on another one, or are cast, or are quantised otherwise, which
        everyone who holds it has to do without.

        Raises:
          ModelError, CheckpointError: as `reloaded`.
        """
        meshes = {getattr(leaf.sharding, "mesh", mesh) for leaf in jax.tree.leaves(self.params)}
        is_other = self.dtype is not None or self.quantization != quantization
        if meshes - {mesh} or is_other:
            self.release()
        own = self
        if is_other:
            own = dataclasses.replace(self, dtype=None, quantization=quantization)
        return own.reloaded(mesh)


def model_config(name: str) -> ModelConfig:
    """`load_model_config` of a checkpoint by its name."""
    return load_model_config(locate(name))


def load_processor(name: str, template: str = "auto") -> Processor:
    """The processor of a checkpoint.

    Raises:
      ModelError, ProcessorError: naming the file that is missing or wrong.
    """
    base = locate(name).base
    return Processor(base, load_config(base), template)


def open_checkpoint(name: str, attention: str = "auto", template: str = "auto") -> Checkpoint:
    """`load_checkpoint` without the parameters, which `Checkpoint.reloaded` reads.

    Raises:
      ModelError, ProcessorError, CheckpointError: naming the file that is missing or wrong.
    """
    opened, origin = _opened(name, None, attention, template)
    return dataclasses.replace(opened, fingerprint=origin.fingerprint(opened.model.config))


def load_start(
    name: str,
    random_seed: int | None = None,
    mesh: Mesh | None = None,
    attention: str = "auto",
    template: str = "auto",
    change: ChangeConfig | None = None,
    seed: int = 0,
    dtype: str | None = None,
    quantization: Quantization | None = None,
) -> Checkpoint:
    """Loads a Hugging Face folder, an Orbax checkpoint, an adapter's folder, or a built-in model.

    Args:
      name: as a recipe's `model` has it. Of a training run's folder the last checkpoint is taken;
        an adapter is merged into the model that it names, which may have one itself.
      random_seed: makes new weights for the config and the processor of the folder.
      mesh: see `load_weights`.
      attention: of the model, see `attention.BACKENDS`.
      template: of the dialogues, see `Processor`.
      change: of the files' config; a reward head that these lack is new, by the seed.
      seed: of a new reward head.
      dtype: that the parameters are cast to; None for that of the files.
      quantization: see `load_weights`.

    Raises:
      ModelError, ProcessorError, CheckpointError: naming the file that is missing or wrong.
    """
    opened, origin = _opened(name, random_seed, attention, template, change, seed)
    if dtype is not None and not origin.is_cast_to(dtype):
        dtype = None
    params = origin.load(opened.model, mesh, dtype, quantization)
    fingerprint = origin.fingerprint(opened.model.config)
    return dataclasses.replace(
        opened, params=params, fingerprint=fingerprint, dtype=dtype, quantization=quantization
    )


def _opened(
    name: str,
    random_seed: int | None,
    attention: str,
    template: str,
    change: ChangeConfig | None = None,
    seed: int = 0,
) -> tuple[Checkpoint, Origin]:
    """A checkpoint before any weight is read, and the origin of its parameters."""
    hub_id = name if is_on_hub(name) else None
    location = locate(name)
    of_files = load_model_config(location)
    config = of_files if change is None else change(of_files)
    model = Model.create(config, attention)
    processor = Processor(location.base, model.config, template)
    _tell_template(processor)
    is_new = config.reward_head is not None and of_files.reward_head is None
    origin = Origin(location, random_seed, seed if is_new and random_seed is None else None)
    folder = (
        location.weights if random_seed is not None else (location.weights, *location.adapters)[-1]
    )
    return Checkpoint(model, processor, {}, "", folder, hub_id, origin), origin


def check_speaker(name: str, why: str) -> None:
    """Looks at a checkpoint's config alone.

    Args:
      name: as a recipe has it.
      why: what it is wanted for, for the message.

    Raises:
      ModelError: it is a reward model, or see `load_model_config`.
    """
    if model_config(name).reward_head is not None:
        raise ModelError(
            f"{name}: is a reward model, which scores responses (`mmpo reward --model {name}`); "
            f"{why} takes a policy, such as the checkpoint that it was trained from"
        )


def open_reward_model(name: str, attention: str = "auto", template: str = "auto") -> Checkpoint:
    """`open_checkpoint` of a model with a reward head.

    Raises:
      ModelError: it has none, or see `open_checkpoint`.
    """
    if model_config(name).reward_head is None:
        raise ModelError(
            f"{name}: has no reward head, so it scores nothing; `mmpo train` makes a reward model "
            "of it (docs/reward.md)"
        )
    return open_checkpoint(name, attention, template)


def load_checkpoint(
    name: str,
    mesh: Mesh,
    attention: str = "auto",
    template: str = "auto",
    dtype: str | None = None,
) -> Checkpoint:
    """`load_start` with the parameters on the mesh."""
    return load_start(name, mesh=mesh, attention=attention, template=template, dtype=dtype)


def _tell_template(processor: Processor) -> None:
    """Says in the log how dialogues become text, which a result depends on."""
    own = "its own" if processor.chat_template is None else processor.template
    log.info("%s: chat template: %s", processor.folder, own)
    if not processor.ends_answers:
        log.warning(
            "%s: its chat template ends no answer with %s. Responses get it at their end, earlier "
            "answers of a dialogue do not. If this is a LLaVA-1.5, it was trained with "
            "`template: vicuna_v1`",
            processor.folder,
            processor.tokenizer.eos_token,
        )
