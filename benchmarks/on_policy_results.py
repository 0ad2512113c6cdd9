"""On-policy methods with each other on the picture world: hallucination, recall, answers.

    python benchmarks/on_policy_results.py --seeds 0 1 2 --output runs/on_policy

All but distillation are rewarded by the scene itself and sample as many captions of as many scenes;
distillation has no reward and learns from the result of GRPO with its seed. Every method gets the
same learning rates to try (tried_rates.py). Prints the tables of tries and results, those in
docs/results.md.
"""

from __future__ import annotations

from tried_rates import Method, compare, parse_options

GRPO = "picture_world_grpo"
AS_CISPO = (
    *("rollout.minibatches=2", "rollout.num_iterations=2"),
    *("training.batch_size=16", "training.save_every=40"),
)
"""Steps of CISPO's recipe, for what they add."""
METHODS = {
    "GRPO": Method(GRPO),
    "GRPO in minibatches": Method(GRPO, overrides=AS_CISPO),
    "CISPO": Method("picture_world_cispo"),
    "RLOO": Method("picture_world_rloo"),
    "PAPO": Method("picture_world_papo"),
    "distillation": Method("picture_world_distillation", teacher="GRPO"),
}
RATES = ("4e-4", "8e-4")


def main() -> None:
    options = parse_options(__doc__, "runs/on_policy", METHODS, RATES)
    compare(options, METHODS, lambda bench: None)


if __name__ == "__main__":
    main()
