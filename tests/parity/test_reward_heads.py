"""Reward heads against transformers' classes and torch, in float64: rewards, losses, gradients."""

import dataclasses
import math

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
import torch
import transformers
from helpers import checks, families
from helpers.reward_heads import KINDS, headed, scored_batch

from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.huggingface import load_model, save_model
from mmpo_jax.checkpoints.peft import save_adapter
from mmpo_jax.checkpoints.tensor_names import path_of
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.data.contexts import all_contexts
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import held_out_batches
from mmpo_jax.models.batch import PackedBatch
from mmpo_jax.models.log_probs import response_rewards
from mmpo_jax.models.lora import Lora, add_adapters, merge_adapters
from mmpo_jax.objectives.registry import Scored
from mmpo_jax.objectives.terms import make_term, needs
from mmpo_jax.parallel.mesh import make_mesh, put_batch
from mmpo_jax.training.examples import make_examples, tokenizer_for
from mmpo_jax.training.losses import make_loss

pytestmark = pytest.mark.parity

TEXT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PROMPT = "what is this ?"
CRITIQUES = (("a red star",), (None, "two ring and a star", None), ("blue", "green ring", "red"))
SCORES = ((3.0, 1.0, 1.0), (0.5, 2.0, 1.0), (1.0, 1.0, 1.0))
RANKS = ((1, 2, 2), (3, 1, 2), (1, 1, 1))


def classifier(name, tied, folder):
    """transformers' sequence classification of a text family, with one label, loaded here too."""
    config = families.FAMILIES[name].config(tied)
    config.num_labels = 1
    checks.save_tokenizer(folder)
    theirs = transformers.AutoModelForSequenceClassification.from_config(config)
    return checks.make_case(folder, theirs)


def asked(name="llama"):
    """Three records about the same things: rankings with and without ties, some with critiques."""
    texts = ("a red star", "two blue ring and a star", "a ring"), ("red", "a ring ?", "two")
    texts = (*texts, ("is this a ring ?", "green", "a star"))
    first, second = families.records(name)
    third = checks.record("2", "what is this ?", ())
    records = []
    for number, record in enumerate((first, second, third)):
        critiques = (CRITIQUES[number] + (None, None))[:3]
        responses = checks.record("", "", (), *texts[number]).responses
        changed = [
            dataclasses.replace(response, rank=rank, critique=critique, scores={"score": score})
            for response, rank, critique, score in zip(
                responses, RANKS[number], critiques, SCORES[number], strict=True
            )
        ]
        records.append(dataclasses.replace(record, responses=tuple(changed)))
    return records


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", TEXT_FAMILIES)
@torch.no_grad()
def test_folders_of_transformers_classes(name, tied, tmp_path):
    """They load; rewards are theirs on rows that they pad on either side; and the way back."""
    case = classifier(name, tied, tmp_path / "theirs")
    assert case.model.config.reward_head.kind == "linear"
    records = asked()
    tokenized, batch = scored_batch(records[1:], case.processor)
    ours = np.asarray(response_rewards(case.model, case.params, batch))
    dialogues = [
        np.concatenate([row.prompt_ids, r.ids]).tolist() for row in tokenized for r in row.responses
    ]
    longest = max(map(len, dialogues))
    for side in ("right", "left"):
        pads = [[checks.PAD_ID] * (longest - len(ids)) for ids in dialogues]
        rows = zip(dialogues, pads, strict=True)
        ids = [row + pad if side == "right" else pad + row for row, pad in rows]
        tensor = torch.tensor(ids)
        theirs = case.theirs(input_ids=tensor, attention_mask=(tensor != checks.PAD_ID).long())
        np.testing.assert_allclose(
            ours.ravel(), theirs.logits[:, 0].numpy(), rtol=0, atol=checks.TOLERANCE
        )
    checks.check_round_trip(case, tmp_path / "back")


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_our_folders_load_in_transformers_class(family_case, tied, tmp_path):
    """A policy under a new head, saved: the class is theirs, every bit is there."""
    for name in TEXT_FAMILIES:
        case = family_case(name, tied)
        model, params = headed(case.model, case.params, "linear", PROMPT)
        folder = tmp_path / name
        save_model(folder, model, params, case.folder)
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert type(theirs).__name__ == model.family.reward_classes[name]
        assert theirs.score.out_features == 1
        written = theirs.state_dict()
        for key, tensor in case.theirs.state_dict().items():
            if key != "lm_head.weight":
                assert torch.equal(written[key], tensor), key
        np.testing.assert_array_equal(written["score.weight"].T.numpy(), params["score"]["kernel"])
        again, read = load_model(folder)
        assert again.config == model.config
        for path, leaf in flatten(params).items():
            np.testing.assert_array_equal(flatten(read)[path], leaf, err_msg=path)


@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_all_families(family_case, name, kind, tmp_path):
    """Both heads go to the disk and back; the names of the tensors are those of their origins."""
    case = family_case(name)
    model, params = headed(case.model, case.params, kind, PROMPT)
    save_model(tmp_path / "out", model, params, case.folder)
    again, read = load_model(tmp_path / "out")
    assert again.config.reward_head == model.config.reward_head
    before, after = flatten(params), flatten(read)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)


@torch.no_grad()
def check_rewards(case, theirs, model, params):
    """Rewards under our parameters are those of a classifier of transformers, or PEFT's of it."""
    tokenized, batch = scored_batch(asked()[1:], case.processor)
    ours = np.asarray(response_rewards(model, params, batch))
    for row, of_row in zip(tokenized, ours, strict=True):
        for response, reward in zip(row.responses, of_row, strict=True):
            ids = torch.tensor(np.concatenate([row.prompt_ids, response.ids])[None]).long()
            wanted = theirs(input_ids=ids).logits.item()
            assert float(reward) == pytest.approx(wanted, abs=checks.TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_adapters_of_peft(family_case, name, tmp_path):
    """One that we write, head included, scores under PEFT as here; and one that PEFT writes."""
    peft = pytest.importorskip("peft")
    case = family_case(name)
    model, params = headed(case.model, case.params)
    rng = np.random.default_rng(0)
    flat = flatten(add_adapters(params, model, Lora(rank=2), (), 0))
    trained = unflatten(
        {
            path: leaf + 0.2 * rng.standard_normal(leaf.shape).astype("f")
            if path.endswith("lora_b")
            else leaf
            for path, leaf in flat.items()
        }
    )
    save_adapter(tmp_path / "ours", model, trained, base=str(case.folder), dropout=0.0)
    auto = transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(case.folder, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    check_rewards(case, theirs, model, merge_adapters(trained))

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"])
    made = peft.get_peft_model(auto.from_pretrained(case.folder, num_labels=1), config).eval()
    with torch.no_grad():
        for key, tensor in made.named_parameters():
            if tensor.requires_grad:
                tensor.normal_(generator=torch.Generator().manual_seed(len(key)))
    made.save_pretrained(tmp_path / "peft")
    read = load_start(str(tmp_path / "peft"))
    assert read.model.config.reward_head.kind == "linear"
    check_rewards(case, made, read.model, read.params)


class Theirs:
    """A head in torch on top of transformers' model, and the loss of a reward model."""

    def __init__(self, case, params, kind):
        self.model = case.theirs.double()
        self.case, self.kind = case, kind
        self.head = {
            path: torch.tensor(np.asarray(leaf, np.float64), requires_grad=True)
            for path, leaf in flatten(params).items()
            if path.startswith(("score", "rm_head"))
        }

    def reward(self, hidden):
        if self.kind == "linear":
            return hidden @ self.head["score/kernel"][:, 0]
        dense, out = (
            lambda x, name=name: (
                x @ self.head[f"rm_head/{name}/kernel"] + self.head[f"rm_head/{name}/bias"]
            )
            for name in ("dense", "out_proj")
        )
        return out(torch.tanh(dense(hidden)))[0]

    def response(self, record, response, ids):
        """(reward, negative log-likelihoods of the critique and of its EOS) of one dialogue."""
        more = families.inputs(self.case)(record, ids)
        more = {k: v.double() if v.is_floating_point() else v for k, v in more.items()}
        said = self.model.model(input_ids=torch.tensor(ids[None]).long(), **more)
        states = said.last_hidden_state[0]
        losses = []
        if response.critique:
            count = len(self.case.processor.encode(" " + response.critique)) + 1  # with EOS
            logits = self.model.lm_head(states[-count - 1 : -1])
            labels = torch.tensor(ids[-count:]).long()
            losses = list(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        return self.reward(states[-1]), losses

    def loss(self, records, tokenized, margin, tie_weight, centring, critique_weight):
        ordered, ties, both, critiques = [], [], [], []
        for record, row in zip(records, tokenized, strict=True):
            found = []
            for place, response in enumerate(record.responses):
                reward, losses = self.response(record, response, dialogue(row, place))
                found.append((reward, response))
                critiques += losses
            for i, (r_i, first) in enumerate(found):
                for j, (r_j, second) in enumerate(found):
                    if first.rank < second.rank:
                        needed = margin * (first.scores["score"] - second.scores["score"])
                        ordered.append(torch.nn.functional.softplus(-(r_i - r_j - needed)))
                        both.append((r_i + r_j) ** 2)
                    elif first.rank == second.rank and i < j:
                        ties.append((r_i - r_j) ** 2)
                        both.append((r_i + r_j) ** 2)
        mean = lambda values: torch.stack(values).mean()  # noqa: E731
        return (
            mean(ordered)
            + tie_weight * mean(ties)
            + centring * mean(both)
            + critique_weight * mean(critiques)
        )


@torch.no_grad()
def their_states(case, record, ids, side):
    """float64[D]: the state at the end of a dialogue that is padded on one side, in the model's
    dtype."""
    pad = np.full(5, checks.PAD_ID)
    row = np.concatenate([ids, pad] if side == "right" else [pad, ids])
    dtype = case.theirs.dtype
    more = families.inputs(case)(record, row)
    more = {k: v.to(dtype) if v.is_floating_point() else v for k, v in more.items()}
    mask = torch.tensor((row != checks.PAD_ID)[None]).long()
    if case.model.config.decoder.attentions[0].query_rope is not None:  # they are not relative
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(0)
    said = case.theirs.model(input_ids=torch.tensor(row[None]).long(), attention_mask=mask, **more)
    return said.last_hidden_state[0, len(ids) - 1 if side == "right" else -1].double()


@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.slow
def test_rewards_over_eight_devices(family_case, name, tmp_path):
    """Of every family under both heads, in float64, behind critiques and without; transformers pads
    every dialogue on the right, and on the left, there in float32: its softmax over nothing is NaN
    in float64."""
    case, records = family_case(name), asked(name)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    for kind in KINDS:
        model, params = headed(case.model, case.params, kind, PROMPT)
        folder = tmp_path / kind
        save_model(folder, model, params, case.folder)
        placed = load_start(str(folder), mesh=mesh)
        scored = Scored(PROMPT)
        tokenized, batch = scored_batch(records, placed.processor, scored, rows=4)
        with jax.enable_x64(True), jax.set_mesh(mesh):
            wide = jax.tree.map(lambda leaf: leaf.astype("float64"), placed.params)
            reward = jax.jit(response_rewards, static_argnums=0)
            found = np.asarray(reward(placed.model, wide, put_batch(batch, mesh)))
        theirs = Theirs(case, params, kind)
        # The grouped product of torch, which mixtures take else, knows no float64.
        case.theirs.set_experts_implementation("eager")
        for record, row, rewards in zip(records, tokenized, found, strict=False):
            for response, value in zip(row.responses, rewards, strict=True):
                ids = np.concatenate([row.prompt_ids, response.ids])
                for side, tolerance in (("right", 2e-5), ("left", 5e-4)):
                    theirs.model.to(torch.float64 if side == "right" else torch.float32)
                    wanted = theirs.reward(their_states(case, record, ids, side)).item()
                    assert value == pytest.approx(wanted, abs=tolerance), (record.id, side)
    case.theirs.float()


def dialogue(row, place):
    """int32[t]: prompt and tokens of a response, in the context in which it stands."""
    found = (context for _, context in all_contexts(row) if len(context.responses[place].ids))
    context = next(found)
    return np.concatenate([context.prompt_ids, context.responses[place].ids])


def ours(model, params, processor, records, terms, packed):
    """(loss, gradient) in float64, of records in one batch."""
    tokenize = tokenizer_for(terms, 0)
    tokenized = [tokenize(record, processor, 2**20, 2**20) for record in records]
    examples = make_examples(tokenized, needs(terms))
    lengths = Lengths(prompt=(128,), response=(64,))
    (batch,) = held_out_batches(examples, processor, lengths, len(records), 1 if packed else None)
    assert isinstance(batch.prompts, PackedBatch) == packed
    loss = make_loss(model, terms, examples[0].names)

    @jax.jit
    @jax.value_and_grad
    def value(params):
        sums, _ = loss.sums(loss.forward(params, None, batch), batch, {})
        return loss.value(sums)

    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return (*value(wide), tokenized)


OPTIONS = {"margin": 0.7, "tie_weight": 0.3, "centring": 0.05}
WEIGHT = 1.7


@pytest.mark.parametrize(
    ("name", "kind", "packed"),
    [
        ("llama", "linear", True),
        ("qwen2", "two_layer", False),
        ("llava", "two_layer", True),
        ("llava", "linear", False),
        ("llava_onevision", "two_layer", True),
        ("qwen2_5_vl", "linear", True),
        ("qwen3_vl", "linear", True),
        ("internvl", "two_layer", False),
        ("llava", "two_layer within", False),
    ],
)
@pytest.mark.slow
def test_loss_and_gradient(family_case, name, kind, packed):
    """Every term together: margins, ties, centring, critiques beside responses without; rankings
    of three from one shared prompt here, every dialogue in a row of its own there."""
    case, (kind, _, within) = family_case(name), kind.partition(" ")
    model, params = headed(case.model, case.params, kind, PROMPT)
    records = asked(name)
    how = {"prompt": "{question} red {response}", "layout": "one_turn"}
    terms = [
        make_term("bradley_terry", **OPTIONS),
        make_term("critique", WEIGHT, **how if within else {"prompt": PROMPT}),
    ]
    with jax.enable_x64(True):
        value, slopes, tokenized = ours(model, params, case.processor, records, terms, packed)
    theirs = Theirs(case, params, kind)
    theirs.model.zero_grad()
    wanted = theirs.loss(records, tokenized, **OPTIONS, critique_weight=WEIGHT)
    wanted.backward()
    tolerance = 1e-6 if name in TEXT_FAMILIES else 1e-5  # their norms, and pixels, are float32
    assert float(value) == pytest.approx(wanted.item(), rel=tolerance)
    flat = flatten(slopes)
    for path, leaf in theirs.head.items():
        np.testing.assert_allclose(flat[path], leaf.grad.numpy(), rtol=0, atol=10 * tolerance)
    compared = 0
    for key, tensor in theirs.model.named_parameters():
        path, layer = path_of(key, model)
        if tensor.grad is None or path not in flat or not path.startswith("language_model"):
            continue
        found = np.asarray(flat[path] if layer is None else flat[path][layer])
        found = found.T if path.endswith("/kernel") else found
        np.testing.assert_allclose(
            found, tensor.grad.numpy(), rtol=0, atol=20 * tolerance, err_msg=key
        )
        compared += 1
    assert compared > 10
    theirs.model.zero_grad()
    theirs.model.float()


def test_the_released_codes_example():
    """MM-RLHF's loss of r = (1.2, 0.3) with cross-entropies of 1.7 and 2.1."""
    from mmpo_jax.objectives.responses import Responses

    chosen, rejected = 1.2, 0.3
    responses = Responses(
        np.zeros((1, 2, 1)),
        np.ones((1, 2, 1), bool),
        rewards=np.array([[chosen, rejected]]),
        fields={"rank": np.array([[1.0, 2.0]])},
    )
    term = make_term("bradley_terry")
    with jax.enable_x64(True):
        sums, _ = term.objective.apply(responses, np.ones(1), {}, term.options)
    parts = np.asarray(sums.loss / np.maximum(sums.weight, 1))
    ours = parts.sum() + 2 * (1.7 + 2.1) / 2
    assert ours == pytest.approx(4.163654, abs=5e-7)
    assert parts[0] == pytest.approx(math.log1p(math.exp(-0.9)))
