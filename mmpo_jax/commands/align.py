"""`mmpo align`: the rounds of a recipe, and their table."""

from __future__ import annotations

import os

from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.alignment.report import render_sources, render_table, warnings
from mmpo_jax.checkpoints.upload import check_hub, upload_result
from mmpo_jax.core.buckets import is_file
from mmpo_jax.core.processes import on_one
from mmpo_jax.evaluation.measure import check_questions, shown_metrics
from mmpo_jax.evaluation.tax import read_tax, render_tax
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.reporting.page import FILE


def main(recipe: AlignRecipe) -> None:
    check_hub(recipe.hub)
    check_questions(recipe.evaluation or ())
    reports = run_alignment(recipe)
    shown = shown_metrics(recipe.evaluation or ())
    tax = on_one(lambda: read_tax(recipe.output)) if shown else None
    print(render_table(reports, shown))
    if sources := render_sources(reports):
        print(f"\n{sources}\n")
    if tax is not None:
        print(f"\n{render_tax(tax)}\n")
    for warning in warnings(reports, tax):
        print(f"warning: {warning}")
    model = os.path.join(recipe.output, "model")
    print(f"model: {model}")
    page = os.path.join(recipe.output, FILE)
    if is_file(page):
        print(f"report: {page}")
    if place := upload_result(model, recipe.hub):
        print(f"hub: {place}")
