"""What comparisons with TRL's trainers share: its batches as ours, and gradients by name."""

import functools

import jax
import numpy as np
from helpers import tiny

from mmpo_jax.checkpoints.huggingface import to_huggingface
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.models.batch import Batch
from mmpo_jax.picture_world.language import CAPTION_PROMPTS
from mmpo_jax.picture_world.render import render
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.metrics import means

ON_CPU = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none"}
"""Options of their trainers in a test."""


def their_model(folder):
    """A LLaVA folder as transformers loads it, in float32."""
    import torch
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def prompt_rows(count):
    """Prompts to sample from, each of another picture.

    All of one length: where theirs are padded on the left, float64 has no finite softmax.
    """
    return [
        {
            "image": render(sample_scene("train", 0, i)),
            "prompt": [{"role": "user", "content": CAPTION_PROMPTS[0]}],
        }
        for i in range(count)
    ]


def sampled_batch(theirs, samples=1) -> Batch:
    """What their trainer sampled, a completion a row, as prompts with so many responses each."""
    columns = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    prompts, prompt_mask, ids, mask = (theirs[name].numpy() for name in columns)
    prompts = [row[m == 1] for row, m in zip(prompts, prompt_mask, strict=True)]
    responses = [row[m == 1] for row, m in zip(ids, mask, strict=True)]
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(prompt, prompts[row // samples * samples])
    grouped = [responses[i : i + samples] for i in range(0, len(responses), samples)]
    return make_batch(prompts[::samples], grouped, theirs["pixel_values"].numpy()[::samples])


def make_batch(prompts, responses, pixel_values) -> Batch:
    """Prompts [N] of token ids with responses [N][S] and one image each."""
    n, s = len(prompts), len(responses[0])
    p, t = max(map(len, prompts)), max(len(ids) for row in responses for ids in row)
    prompt_ids, prompt_mask = np.zeros((n, p), np.int32), np.zeros((n, p), bool)
    response_ids, response_mask = np.zeros((n, s, t), np.int32), np.zeros((n, s, t), bool)
    for i in range(n):
        prompt_ids[i, : len(prompts[i])], prompt_mask[i, : len(prompts[i])] = prompts[i], True
        for j, ids in enumerate(responses[i]):
            response_ids[i, j, : len(ids)], response_mask[i, j, : len(ids)] = ids, True
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        pixel_values=np.asarray(pixel_values)[:, None],
        **tiny.reading_order(prompt_ids, [len(ids) for ids in prompts]),
        response_ids=response_ids,
        response_mask=response_mask,
        loss_mask=response_mask,
        weights=np.ones(n, np.float32),
    )


def loss_and_gradient(
    model, params, batch: TrainBatch, term, reference=None, temperature=1.0, teacher=(None, None)
):
    """(loss, metrics, gradient) as a step of training has them; a teacher is (model, params)."""
    fixed = _Fixed((model, term, temperature, teacher[0]))
    loss, metrics, gradient = _compiled(params, batch, reference, teacher[1], fixed)
    return loss, means([metrics]), gradient


class _Fixed(tuple):
    """Static under jit by identity: terms hold a dict."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@functools.partial(jax.jit, static_argnames="fixed")
def _compiled(params, batch, reference, taught, fixed):
    model, term, temperature, teacher = fixed
    loss = make_loss(model, [term], temperature=temperature, teacher=teacher)

    def value(params):
        outputs = loss.forward(params, reference, batch, taught)
        sums, _ = loss.sums(outputs, batch, loss.state)
        return loss.value(sums), loss.metrics(sums)

    (result, metrics), gradient = jax.value_and_grad(value, has_aux=True)(params)
    return result, metrics, gradient


def assert_same_gradients(model, gradient, theirs, at_least=0.01):
    """Ours as transformers names them against `.grad` of its parameters; the largest shows that
    there is something to compare."""
    ours = {in_memory_name(key): value for key, value in to_huggingface(gradient, model)}
    parameters = dict(theirs.named_parameters())
    assert ours.keys() == parameters.keys()
    largest = max(np.abs(value).max() for value in ours.values())
    assert largest > at_least
    for name, parameter in parameters.items():
        expected = 0 if parameter.grad is None else parameter.grad.numpy()
        np.testing.assert_allclose(
            ours[name], expected, rtol=0, atol=1e-5 * max(1, largest), err_msg=name
        )


def in_memory_name(key):
    if key.startswith("language_model.lm_head."):
        return key.removeprefix("language_model.")
    for old, new in (("language_model.model.", "language_model."), (".vision_model.", ".")):
        key = key.replace(old, new)
    return f"model.{key}"


def as_float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def rms_norm(self, x):
    """`LlamaRMSNorm.forward` in the dtype of its input; theirs rounds to float32 inside."""
    import torch

    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
