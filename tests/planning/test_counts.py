"""FLOPs and bytes against counts by hand and against what is traced."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny
from helpers.llava_7b import BODY, LAYERS, PROJECTOR, TOWER, VOCABULARY, WIDE, WIDTH, llava_7b

from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.generation.refill import Layout
from mmpo_jax.models.log_probs import Teacher, response_log_probs, response_statistics
from mmpo_jax.models.lora import Lora, add_adapters, is_adapter
from mmpo_jax.models.model import Model, read_config
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.planning import abstract
from mmpo_jax.planning.abstract import Sizes
from mmpo_jax.planning.counts import Computation, decode_work, forward_work, train_work
from mmpo_jax.planning.parts import computed_pairs, mean_pool
from mmpo_jax.planning.teaching import Teaching
from mmpo_jax.recipes.sampling import Decoding

BF16 = 2
HEAD = WIDTH * VOCABULARY


def of_7b(**mesh):
    return Computation(llava_7b(), make_mesh(**mesh), BF16, "splash")


def trained_of(model, frozen="vision_tower/"):
    params = flatten(model.abstract_params())
    return params, [path for path in params if not path.startswith(frozen)]


PAIR = Sizes(8, 676, 2, 200, 1)
"""RLAIF-V's lengths: 576 tokens of a picture, 100 of text, two responses of 200."""


def test_a_pair_of_llava_7b_by_hand():
    computation = of_7b(fsdp=8)
    work = train_work(computation, *trained_of(llava_7b()), PAIR, 1, "none")
    tokens, answers = 676 + 2 * 200, 2 * 200
    pairs = 676 * 677 / 2 + 2 * (200 * 676 + 200 * 201 / 2)
    decoder = 2 * BODY * tokens + 2 * HEAD * answers + 4 * WIDTH * LAYERS * pairs
    tower = 2 * TOWER * 577 + 4 * 1024 * 23 * 577**2
    projector = 2 * PROJECTOR * 576
    by_hand = 3 * decoder + tower + 2 * projector
    assert work.model_flops / 8 == pytest.approx(by_hand, rel=0.01)
    assert work.model_flops / 8 == pytest.approx(43.4e12, rel=0.01)
    # Blocks of 512 hold more pairs than are seen, kernels and the head compute again what is there.
    assert by_hand < work.flops / 8 < 1.15 * by_hand


def test_rematerialisation_adds_a_pass_of_the_layers():
    none, full = (
        train_work(of_7b(fsdp=8), *trained_of(llava_7b()), PAIR, 1, remat)
        for remat in ("none", "full")
    )
    again = 2 * BODY * PAIR.tokens
    assert full.flops - none.flops == pytest.approx(again, rel=0.05)
    assert full.model_flops == none.model_flops


def test_micro_batches_gather_weights_as_often():
    computation, whole = of_7b(fsdp=8), trained_of(llava_7b())
    one, two = (train_work(computation, *whole, PAIR, count, "none") for count in (1, 2))
    assert two.flops == 2 * one.flops
    assert two.exchanged == 2 * one.exchanged


def test_bytes_of_a_training_step_by_hand():
    """Weights are gathered and read for both passes, gradients written; every product reads and
    writes its tokens in three passes; AdamW moves 28 bytes for a parameter."""
    work = train_work(of_7b(fsdp=8), *trained_of(llava_7b()), PAIR, 1, "none")
    weights = BF16 * BODY * (2 * 2 + 1)
    per_layer = 4 * (WIDTH + WIDTH) + 3 * (WIDTH + WIDE)
    tokens = 3 * BF16 * LAYERS * per_layer * PAIR.tokens / 8
    attention = 3.5 * BF16 * LAYERS * PAIR.tokens / 8 * 4 * WIDTH
    optimizer = 28 * (BODY + HEAD + HEAD) / 8
    logits = 5 * 4 * 8 * 400 * VOCABULARY / 8
    scores = 12 * 16 * 23 * 577**2
    by_hand = weights + tokens + attention + optimizer + logits + scores
    assert work.bytes == pytest.approx(by_hand, rel=0.05)
    # Gathered over eight devices for two passes, added up once, of which each keeps a part.
    exchanged = BF16 * BODY * 7 / 8 * (2 + 1)
    assert work.exchanged == pytest.approx(exchanged, rel=0.05)


def test_a_smaller_state_of_the_optimizer_moves_less():
    whole = of_7b(fsdp=8), *trained_of(llava_7b()), PAIR, 1, "none"
    adamw, lion = train_work(*whole), train_work(*whole, moments=4 * (BODY + 2 * HEAD) / 8)
    assert adamw.bytes - lion.bytes == pytest.approx(2 * 4 * (BODY + 2 * HEAD) / 8, rel=0.02)
    assert adamw.flops == lion.flops


def test_a_decoded_token_reads_weights_and_caches_once():
    layout = Layout(rows=4, width=2, groups=2, members=3, batch=4)
    decoding = Decoding(num_samples=10, max_new_tokens=512)
    work = decode_work(of_7b(fsdp=1, tensor=8), layout, 832, decoding)
    places = 4 * 6
    token = 2 * LAYERS * WIDTH * BF16
    cached = 4 * (2 * 832 + 2 * 3 * mean_pool(512))
    by_hand = BF16 * (BODY + HEAD) / 8 + cached * token / 8
    assert work.bytes == pytest.approx(by_hand, rel=0.05)
    attention = 4 * LAYERS * WIDTH * places * (2 * 832 + 3 * mean_pool(512))
    assert work.flops == pytest.approx(places * 2 * (BODY + HEAD) + attention, rel=0.01)
    assert 256 < mean_pool(512) < 512


def test_adapters_take_no_gradients_of_kernels():
    model = llava_7b()
    params = flatten(add_adapters(model.abstract_params(), model, Lora(rank=16), (), 0))
    trained = [path for path in params if is_adapter(path)]
    work = train_work(of_7b(fsdp=8), params, trained, PAIR, 1, "none")
    # 29 TFLOP a pair instead of 43.4: no gradients of kernels, and little for the adapters.
    assert work.model_flops / 8 == pytest.approx(29.0e12, rel=0.03)


def test_blocks_that_splash_attention_visits():
    # 1,024 tokens of prompt and two responses of 512: causal blocks, and none between siblings.
    assert computed_pairs(Sizes(1, 1024, 2, 512), "splash") == 512**2 * (1 + 2 + 3 + 3)


def traced_flops(jaxpr):
    """FLOPs of the products in what is traced, loops by their length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(map(traced_flops, inner_jaxprs(equation.params)))
    return total


def inner_jaxprs(params):
    """The jaxprs among an equation's parameters, also in tuples, closed or not."""
    for leaf in jax.tree.leaves(list(params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        if hasattr(leaf, "eqns"):
            yield getattr(leaf, "jaxpr", leaf)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("learns", ["", "vision_tower/"])
def test_counts_are_those_of_the_traced_step(remat, learns):
    model = Model.create(read_config(tiny.make_config()), "xla")
    mesh = make_mesh(fsdp=8)
    sizes = Sizes(8, 160, 2, 40, 1)
    params, trained = trained_of(model, learns or "nothing")
    batch = abstract.batch(model, sizes, mesh)
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in params.items()}

    def loss(learned, frozen, batch):
        return response_log_probs(model, unflatten(learned | frozen), batch, remat=remat).sum()

    learned = {path: shapes[path] for path in trained}
    frozen = {path: leaf for path, leaf in shapes.items() if path not in learned}
    traced = jax.make_jaxpr(jax.grad(loss))(learned, frozen, batch)
    work = train_work(Computation(model, mesh, 4, "xla"), params, trained, sizes, 1, remat)
    assert work.flops == pytest.approx(traced_flops(traced.jaxpr), rel=0.05)


def test_a_teachers_pass_is_that_of_the_traced_step():
    """The whole step's products less those without a teacher; its head is applied twice."""
    model = Model.create(read_config(tiny.make_config()), "xla")
    larger = {"hidden_size": 48, "num_hidden_layers": 3}
    teacher = Model.create(read_config(tiny.make_config(text=larger)), "xla")
    mesh, sizes, shown = make_mesh(fsdp=8), Sizes(8, 96, 2, 40, 1), Sizes(8, 160, 2, 40, 1)
    prompts = abstract.batch(model, sizes, mesh)
    of_teacher = abstract.batch(teacher, shown, mesh)

    def loss(params, theirs, prompts, of_teacher):
        taught = Teacher(teacher, theirs, of_teacher, 0.5, None)
        names, given = (("divergence",), taught) if theirs else (("entropy",), None)
        found = response_statistics(model, params, prompts, names, teacher=given)
        return sum(value.sum() for value in found.values())

    def counted(theirs):
        given = model.abstract_params(), theirs, prompts, of_teacher
        return traced_flops(jax.make_jaxpr(jax.grad(loss))(*given).jaxpr)

    opened = types.SimpleNamespace(model=teacher)
    work = Teaching(opened, shown, False).work(Computation(teacher, mesh, 4, "xla"), 8)
    added = counted(teacher.abstract_params()) - counted({})
    assert work.flops == pytest.approx(added, rel=0.03)
    assert work.flops > forward_work(Computation(teacher, mesh, 4, "xla"), shown).flops


def test_a_pass_without_gradients_is_that_of_the_traced_one():
    model = Model.create(read_config(tiny.make_config()), "xla")
    mesh, sizes = make_mesh(fsdp=8), Sizes(8, 160, 2, 40, 1)
    traced = jax.make_jaxpr(functools.partial(response_log_probs, model))(
        model.abstract_params(), abstract.batch(model, sizes, mesh)
    )
    work = forward_work(Computation(model, mesh, 4, "xla"), sizes)
    assert work.flops == pytest.approx(traced_flops(traced.jaxpr), rel=0.03)
    assert work.model_flops < work.flops
