"""Two small rounds of alignment, with feedback that a random model can earn."""

from collections.abc import Sequence

from mmpo_jax.alignment.candidates import load_prompts
from mmpo_jax.core.files import fingerprint_bytes
from mmpo_jax.data.records import Record
from mmpo_jax.data.tokenization import TokenizedRecord, tokenize_prompt
from mmpo_jax.data.usable import usable_records
from mmpo_jax.feedback.labeler import Answer
from mmpo_jax.feedback.splitters import Claim, Division
from mmpo_jax.recipes.align_recipe import AlignRecipe

PROMPTS, SAMPLES, ROUNDS = 12, 3, 2


STAGES = ("generate", "divide", "conquer", "judge", "pairs", "prompts", "reference")


class WordSplitter:
    """A random model makes no captions: every different word it says is a claim."""

    key = "words"

    def divide(self, items):
        return [self.divide_one(item.response) for item in items]

    def divide_one(self, response):
        words = dict.fromkeys(response.split())
        return Division(tuple(Claim(word, f"is there {word} ?") for word in words))

    def release(self):
        pass


class CoinLabeler:
    """Answers by the hash of the question and the image."""

    fingerprint = "coin"

    def __init__(self, *args, **kwargs):
        pass

    def answer(self, items):
        def coin(question, images):
            digest = fingerprint_bytes(question.encode() + images[0].read())
            return int(digest[:2], 16) / 255

        return [
            [Answer(p := coin(q, images), 1 - p) for q in questions]
            for _, images, questions in items
        ]


def prompts_of(recipe, start) -> tuple[Sequence[Record], list[TokenizedRecord]]:
    """(records, their prompts as tokens) of a recipe's data, as a round is given them."""
    record_set, tokenized = usable_records(
        load_prompts(recipe),
        start.processor,
        recipe.lengths,
        f"{recipe.output}/skipped.jsonl",
        function=tokenize_prompt,
    )
    return record_set.records, tokenized


def make_recipe(output, model, **changes) -> AlignRecipe:
    return AlignRecipe.model_validate(
        {
            "output": str(output),
            "model": str(model),
            "data": {"source": "picture_world", "split": "align", "size": 30, "image_size": 24},
            "rounds": ROUNDS,
            "prompts_per_round": PROMPTS,
            "lengths": {"prompt": [16], "response": [16]},
            "sampling": {
                "num_samples": SAMPLES,
                "temperature": 1.0,
                "max_new_tokens": 6,
                "batch_size": 12,
            },
            "pairing": {"length_balance": "none"},
            "training": {
                "optimizer": {"learning_rate": 1e-3},
                "batch_size": 4,
                "max_steps": 3,
                "log_every": 1,
                "save_every": 2,
            },
            "evaluation": {
                **{"type": "picture_world", "size": 8, "questions": 2, "image_size": 24},
                "batch_size": 8,
                "max_new_tokens": 6,
            },
            **changes,
        }
    )
