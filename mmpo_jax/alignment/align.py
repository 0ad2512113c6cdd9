"""`mmpo align`: rounds of RLAIF-V, each from the newest model, with a report at the end."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from contextlib import AbstractContextManager
from typing import Any

from jax.sharding import Mesh

from mmpo_jax.alignment.candidates import (
    check_candidates,
    check_servers,
    load_prompts,
    responses_name,
)
from mmpo_jax.alignment.findings import Findings, round_folder
from mmpo_jax.alignment.report import RoundReport, read_report
from mmpo_jax.alignment.round import TRAIN, Round, pair_data, run_round, training_start
from mmpo_jax.alignment.selection import FOLDER as HELD_OUT
from mmpo_jax.alignment.selection import split_held_out
from mmpo_jax.checkpoints.cards import ModelCard, SavedWeights, make_card, read_saved, write_card
from mmpo_jax.checkpoints.checkpoint import (
    Checkpoint,
    check_speaker,
    load_checkpoint,
    model_config,
    open_checkpoint,
)
from mmpo_jax.checkpoints.fingerprints import fingerprint_model, has_fingerprint
from mmpo_jax.checkpoints.orbax import check_holds_checkpoints
from mmpo_jax.core import progress
from mmpo_jax.core.buckets import copy_folder, is_file, replace_folder
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import (
    read_json,
    read_table,
    write_json,
)
from mmpo_jax.core.processes import on_one
from mmpo_jax.data.records import Record
from mmpo_jax.data.skipped import SKIPPED_FILE
from mmpo_jax.data.sources import RecordSet
from mmpo_jax.data.tokenization import tokenize_prompt
from mmpo_jax.data.usable import usable_records
from mmpo_jax.feedback.judge import Judge
from mmpo_jax.feedback.judges import Models, make_judge, unseen_by_judge
from mmpo_jax.feedback.served import Servers
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.reporting import page
from mmpo_jax.reporting.runs import save_recipe
from mmpo_jax.training.plan import check_training, mesh_sizes
from mmpo_jax.training.saving import MODEL, load_before, measure_weights, save_weights
from mmpo_jax.training.tracking import check_tracking

log = logging.getLogger(__name__)


def run_alignment(recipe: AlignRecipe) -> list[RoundReport]:
    """Runs or finishes all rounds.

    Writes to the recipe's output folder: `round-0/` (the start model's evaluation), `round-<i>/`
    (a file per stage, checkpoints, the trained `model/`), `model/` (the last round's, or that
    of `selection`), the report so far (`rounds.txt`, `rounds.json`, `tax.json`), and
    at the end `report.html`.

    Returns:
      One row per round, the start model's first.

    Raises:
      MmpoError: whatever the user can mend, naming it.
    """
    check_holds_checkpoints(recipe.output)
    check_tracking(recipe.training.wandb)
    decoder = model_config(recipe.model).decoder
    mesh = make_mesh(**mesh_sizes(recipe.devices, recipe.training, decoder))
    inference = recipe.inference_devices
    with Servers(recipe.output) as servers:
        models = Models(
            mesh if inference is None else make_mesh(**inference.model_dump()),
            recipe.attention,
            servers,
            base=recipe.model,
            template=recipe.template,
            seed=recipe.seed,
            dtype=recipe.inference_dtype,
        )
        judge = make_judge(recipe.feedback, models)
        check_candidates(recipe)
        prompts = load_prompts(recipe)
        if not _is_judged(recipe):
            judge.check(prompts.records)
            check_servers(recipe, servers)
        return _run_rounds(recipe, prompts, judge, models, mesh)


def _run_rounds(
    recipe: AlignRecipe, prompts: RecordSet, judge: Judge, models: Models, mesh: Mesh
) -> list[RoundReport]:
    inference, dtype = models.mesh, recipe.inference_dtype
    check_speaker(recipe.model, "mmpo align")
    start = load_checkpoint(recipe.model, inference, recipe.attention, recipe.template, dtype)
    card = make_card(
        recipe,
        start.model,
        {},
        from_hub=start.hub_id is not None,
        base_fingerprint=start.fingerprint,
        quantized_base=recipe.training.quantization or start.quantized_base,
    )
    check_training(recipe.training, start.model, mesh)
    on_one(lambda: save_recipe(recipe.output, card.recipe))
    record_set, tokenized = usable_records(
        prompts,
        start.processor,
        recipe.lengths,
        os.path.join(recipe.output, SKIPPED_FILE),
        unseen_by_judge(recipe.feedback, models),
        tokenize_prompt,
    )
    records, held = record_set.records, None
    if recipe.selection is not None:
        records, held = split_held_out(records, tokenized, recipe.selection)
    shares = split_prompts(records, recipe)
    by_id = {record.id: record for record in tokenized}
    findings = Findings(recipe, judge, models, held)
    done: dict[int, tuple[Round, ModelCard]] = {}
    with _telling(0, recipe):
        findings.add(RoundReport(0, findings.look_at(0, start)))
    for index, records in enumerate(shares, start=1):
        work = Round(
            index=index,
            folder=round_folder(recipe, index),
            start=start,
            records=records,
            tokenized=[by_id[record.id] for record in records],
            recipe=recipe,
            mesh=mesh,
            inference_mesh=inference,
            card=card,
            servers=models.servers,
            run_before=os.path.join(round_folder(recipe, index - 1), TRAIN) if index > 1 else None,
        )
        models.held = start
        with _telling(index, recipe):
            trained = run_round(work, judge)
            start.release()
            start = load_checkpoint(trained, inference, recipe.attention, dtype=dtype)
            metrics = findings.look_at(index, start)
        names = work.folder, metrics, responses_name(recipe)
        report = on_one(functools.partial(read_report, index, *names))
        findings.add(report)
        done[index] = work, dataclasses.replace(card, metrics=report.values(findings.shown))
        write_card(trained, dataclasses.replace(done[index][1], saved=SavedWeights("float32")))
    findings.tell_result()
    if findings.result != index:
        chosen = os.path.join(done[findings.result][0].folder, MODEL)
        start = open_checkpoint(chosen, recipe.attention)
    work, last = done[findings.result]
    save_result(recipe, work, start, last)
    on_one(lambda: write_page(recipe.output))
    return findings.reports


def write_page(folder: str) -> None:
    """Writes the page about an alignment. What goes wrong is said and no more: it is not worth
    losing the end of a run, and `mmpo report` tries again."""
    try:
        with progress.doing("writing the report"):
            page.write_report([folder], os.path.join(folder, page.FILE))
    except Exception as error:
        log.warning("%s: the report cannot be written: %r", folder, error)


def save_result(recipe: AlignRecipe, work: Round, trained: Checkpoint, card: ModelCard) -> None:
    """Writes the model of a round as the alignment's, in the recipe's dtype.

    What a narrower dtype keeps is measured on that round's pairs, and of the update of all rounds.

    Args:
      recipe: of the alignment.
      work: the round.
      trained: its model, as its folder has it.
      card: of the model.
    """
    result, dtype = os.path.join(recipe.output, MODEL), recipe.training.save_dtype
    manifest = os.path.join(recipe.output, "model.json")
    of = [trained.fingerprint, dtype]
    done = on_one(lambda: _read_saved(manifest, result, of))
    if done:
        saved = read_saved(done["saved"])
        write_card(result, dataclasses.replace(card, saved=saved))
        return
    if dtype == "float32":
        saved = SavedWeights(dtype)
        on_one(lambda: _copy_model(trained, result))
        write_card(result, dataclasses.replace(card, saved=saved))
    else:
        names = responses_name(recipe), "pairs"
        files = [os.path.join(work.folder, f"{name}.parquet") for name in names]
        generated, pairs = on_one(lambda: [read_table(file) for file in files])
        work = dataclasses.replace(work, start=training_start(work))
        trained = trained.moved(work.mesh)
        measure = functools.partial(
            measure_weights,
            work.start,
            pair_data(work, generated, pairs).examples,
            recipe.training,
            recipe.lengths,
            work.mesh,
        )
        before = load_before(card, trained.model, work.mesh)
        run = os.path.join(work.folder, TRAIN)
        saved = save_weights(
            result, trained, before, trained.params, dtype, card, work.mesh, measure, run
        )

    def note() -> None:
        done = {"of": of, "model": fingerprint_model(result), "saved": dataclasses.asdict(saved)}
        write_json(manifest, done)

    on_one(note)


def _read_saved(manifest: str, result: str, of: list[str]) -> dict[str, Any]:
    """What is noted of a result, where it is there and made of this; empty otherwise."""
    done = read_json(manifest)
    return done if done.get("of") == of and has_fingerprint(result, done["model"]) else {}


def _copy_model(trained: Checkpoint, target: str) -> None:
    if not has_fingerprint(target, trained.fingerprint):
        replace_folder(target, lambda staging: copy_folder(trained.folder, staging))


def split_prompts(records: list[Record], recipe: AlignRecipe) -> list[list[Record]]:
    """The prompts of every round.

    Raises:
      MmpoError: there are too few for the recipe.
    """
    share = recipe.prompts_per_round
    if share is None:
        return [records] * recipe.rounds
    if share * recipe.rounds > len(records):
        raise MmpoError(
            f"{recipe.rounds} rounds of {share} prompts need {share * recipe.rounds}, "
            f"the data has {len(records)} usable ones"
        )
    return [records[i * share : (i + 1) * share] for i in range(recipe.rounds)]


def _is_judged(recipe: AlignRecipe) -> bool:
    """Whether all rounds have their verdicts, so that servers need not be up any more. Where they
    turn out to be of another recipe, who is asked says what is wrong."""
    folders = [round_folder(recipe, index) for index in range(1, recipe.rounds + 1)]
    if recipe.selection is not None:
        looked_at = [round_folder(recipe, 0), *folders]
        folders += [os.path.join(folder, HELD_OUT) for folder in looked_at]
    files = [os.path.join(folder, "judge.json") for folder in folders]
    return on_one(lambda: all(map(is_file, files)))


def _telling(index: int, recipe: AlignRecipe) -> AbstractContextManager:
    return progress.doing(f"round {index}/{recipe.rounds}")
