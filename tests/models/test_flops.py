"""FLOPs that a model needs, against counts by hand."""

import dataclasses
import functools
import math

import pytest
from helpers import tiny
from helpers.llava_7b import BODY, LAYERS, PROJECTOR, TOWER, VOCABULARY, WIDTH, llava_7b

from mmpo_jax.core.trees import flatten
from mmpo_jax.models.config import RewardHead
from mmpo_jax.models.flops import input_gradients, model_flops
from mmpo_jax.models.layer_kinds import ExpertsConfig, MlpConfig
from mmpo_jax.models.lora import Lora, add_adapters, is_adapter
from mmpo_jax.models.model import Model, read_config

PROMPT, RESPONSES = 100 + 576, (200, 200)
TOKENS, TARGETS = PROMPT + sum(RESPONSES), sum(RESPONSES)
SEEN = PROMPT * (PROMPT + 1) // 2 + sum(n * PROMPT + n * (n + 1) // 2 for n in RESPONSES)


@functools.cache
def shapes_of_7b():
    """(LLaVA-1.5-7B, its parameters' shapes by path)."""
    model = llava_7b()
    return model, flatten(model.abstract_params())


DECODER = 2 * BODY * TOKENS + 4 * LAYERS * WIDTH * SEEN
HEAD = 2 * WIDTH * VOCABULARY * TARGETS
PATCHES = 2 * 3 * 14**2 * 1024 * 576
PICTURE = 2 * TOWER * 577 + 4 * 1024 * 23 * 577**2 + PATCHES
OF_PROJECTOR = 2 * PROJECTOR * 576


def pair(flops):
    return flops.of(TOKENS, TARGETS, SEEN, [1])


def trained_without(*frozen):
    model, params = shapes_of_7b()
    return model, params, [path for path in params if not path.startswith(frozen)]


def test_a_forward_pass_by_hand():
    by_hand = DECODER + HEAD + PICTURE + OF_PROJECTOR
    assert pair(model_flops(*shapes_of_7b())) == pytest.approx(by_hand, rel=1e-6)


def test_a_pair_that_is_trained_by_hand():
    """All but the tower: three times as much, but for the projector, below which is nothing."""
    count = pair(model_flops(*trained_without("vision_tower/")))
    by_hand = 3 * (DECODER + HEAD + OF_PROJECTOR) + PICTURE
    assert count == pytest.approx(by_hand, rel=1e-3)
    assert count == pytest.approx(43.4e12, rel=0.01)


def test_what_is_frozen_below_takes_no_gradients():
    """With tower, projector and embedding frozen, the first gradient is that of a kernel."""
    frozen = "vision_tower/", "multi_modal_projector/", "language_model/embed_tokens/"
    count = pair(model_flops(*trained_without(*frozen)))
    assert count == pytest.approx(3 * (DECODER + HEAD) + PICTURE + OF_PROJECTOR, rel=1e-6)


def test_all_of_it_is_trained():
    by_hand = 3 * (DECODER + HEAD + PICTURE + OF_PROJECTOR)
    assert pair(model_flops(*trained_without("nothing"))) == pytest.approx(by_hand, rel=1e-6)


def test_only_the_head_is_trained():
    model, params = shapes_of_7b()
    count = pair(model_flops(model, params, ["language_model/lm_head/kernel"]))
    assert count == pytest.approx(DECODER + 2 * HEAD + PICTURE + OF_PROJECTOR, rel=1e-6)


def test_only_a_reward_head_is_trained():
    """Which lies on top, so that no gradient goes down."""
    model, params = shapes_of_7b()
    count = pair(model_flops(model, params, ["score/kernel"]))
    assert count == pytest.approx(DECODER + HEAD + PICTURE + OF_PROJECTOR, rel=1e-6)


def test_adapters_take_no_gradients_of_kernels():
    model, params = shapes_of_7b()
    with_adapters = flatten(add_adapters(model.abstract_params(), model, Lora(rank=16), (), 0))
    trained = [path for path in with_adapters if is_adapter(path)]
    assert len(trained) > 0 and with_adapters.keys() > params.keys()
    # 29 TFLOP a pair instead of 43.4, and little for the adapters.
    assert pair(model_flops(model, with_adapters, trained)) == pytest.approx(29.0e12, rel=0.03)


def test_pictures_count_as_they_are():
    flops = model_flops(*shapes_of_7b())
    without = flops.of(TOKENS, TARGETS, SEEN, [])
    of_three = flops.of(TOKENS, TARGETS, SEEN, [1, 2])
    assert (of_three - without) == pytest.approx(3 * (PICTURE + OF_PROJECTOR), rel=1e-6)


def test_several_models_add_up():
    once = model_flops(*shapes_of_7b())
    assert pair(once + once) == 2 * pair(once)


def with_decoder(**changes):
    """(a small model with such a decoder, its parameters' shapes by path)."""
    config = read_config(tiny.make_config())
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **changes))
    model = Model.create(config)
    return model, flatten(model.abstract_params())


def test_a_tied_embedding_is_the_head():
    model, params = with_decoder(tie_word_embeddings=True)
    path = "language_model/embed_tokens/embedding"
    size = math.prod(params[path].shape)
    assert model_flops(model, params).target == 2 * size
    assert model_flops(model, params, [path]).target == 3 * 2 * size


def test_a_model_without_a_head_predicts_nothing():
    assert model_flops(*with_decoder(language_head=False)).target == 0


@pytest.mark.parametrize("kind", ["linear", "two_layer"])
def test_a_reward_head_is_no_part_of_the_tower(kind):
    model, params = with_decoder()
    config = dataclasses.replace(model.config, reward_head=RewardHead(kind))
    judge = Model.create(config)
    judge_params = flatten(judge.abstract_params())
    assert judge_params.keys() > params.keys()
    assert model_flops(judge, judge_params) == model_flops(model, params)


@pytest.mark.parametrize(
    ("trained", "below"),
    [
        (["language_model/lm_head/kernel"], (False, False, False)),
        (["language_model/layers/mlp/up_proj/kernel"], (False, False, True)),
        (["multi_modal_projector/linear_1/kernel"], (False, True, True)),
        (["vision_tower/layers/mlp/fc1/kernel"], (True, True, True)),
    ],
)
def test_where_gradients_pass(trained, below):
    assert tuple(input_gradients(trained).values()) == below


def test_a_mixture_needs_the_experts_of_a_token(tiny_model):
    """As a dense model of the same active size does, and a router; its kernels are all there."""
    config = tiny_model[0].config
    decoder = config.decoder
    size, depth = decoder.hidden_size, len(decoder.layers)
    experts = ExpertsConfig(8, 3, 16, "silu", normalised=True)

    def flops(mlp):
        layers = tuple(dataclasses.replace(layer, mlp=mlp) for layer in decoder.layers)
        changed = dataclasses.replace(decoder, layers=layers)
        model = Model.create(dataclasses.replace(config, decoder=changed))
        return model_flops(model, flatten(model.abstract_params()))

    dense, mixture = flops(MlpConfig(3 * 16, "silu", bias=False)), flops(experts)
    assert mixture.token == dense.token + 2 * depth * size * 8
    assert mixture.target == dense.target
