"""The picture world as records: supervised dialogues, prompts to caption, questions to answer."""

from __future__ import annotations

from mmpo_jax.data.records import ImageRef, Record, Response, Turn
from mmpo_jax.picture_world.language import (
    ANSWERS,
    CAPTION_PROMPTS,
    Question,
    questions,
    supervised_caption,
)
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import Scene, generator, sample_scene

Exchange = tuple[str, str]
"""(what the user says, what the assistant answers)."""

_SUPERVISED, _QUESTIONS, _PROMPT = 1, 2, 3  # streams of random numbers, apart from the scene's


def scene_id(split: str, seed: int, index: int) -> str:
    return f"shapes-{split}-{seed}-{index:06d}"


def scenes(split: str, seed: int, size: int) -> list[Scene]:
    """The first `size` scenes of a split."""
    return [sample_scene(split, seed, index) for index in range(size)]


def supervised_records(
    split: str, seed: int, size: int, image_size: int, num_questions: int, hallucination_rate: float
) -> list[Record]:
    """One record per scene: a caption, at times with an invented thing, and clean answers.

    Returns:
      Records without a prompt of their own. The first dialogue of each is the caption, the others
      hold two of the `num_questions` questions each, which makes them about as long.
    """
    records = []
    for index in range(size):
        scene, captioning, answering = supervised_texts(
            split, seed, index, num_questions, hallucination_rate
        )
        said = [captioning], *_groups(answering)
        records.append(
            Record(
                id=scene_id(split, seed, index),
                images=(_image(scene, split, seed, index, image_size),),
                prompt=(),
                responses=tuple(_dialogue(exchanges) for exchanges in said),
            )
        )
    return records


def supervised_texts(
    split: str, seed: int, index: int, num_questions: int, hallucination_rate: float
) -> tuple[Scene, Exchange, list[Exchange]]:
    """What is said about a scene in supervised data.

    Returns:
      (the scene, a prompt and its caption, `num_questions` questions with clean answers).
    """
    scene = sample_scene(split, seed, index)
    rng = generator(split, seed, index, _SUPERVISED)
    caption = supervised_caption(scene, rng, hallucination_rate)
    prompt = CAPTION_PROMPTS[rng.integers(len(CAPTION_PROMPTS))]
    asked = questions(scene, rng, num_questions)
    return scene, (prompt, caption), [(q.text, ANSWERS[q.answer]) for q in asked]


def prompt_records(split: str, seed: int, size: int, image_size: int) -> list[Record]:
    """One record per scene that asks for a caption, without responses; its answer is the scene."""
    records = []
    for index in range(size):
        scene = sample_scene(split, seed, index)
        rng = generator(split, seed, index, _PROMPT)
        prompt = CAPTION_PROMPTS[rng.integers(len(CAPTION_PROMPTS))]
        records.append(
            Record(
                id=scene_id(split, seed, index),
                images=(_image(scene, split, seed, index, image_size),),
                prompt=(Turn("user", prompt),),
                responses=(),
                extra={"answer": scene.to_dict()},
            )
        )
    return records


def held_out_questions(split: str, seed: int, index: int, count: int) -> list[Question]:
    """`count` questions about a scene, the same on every call."""
    scene = sample_scene(split, seed, index)
    return questions(scene, generator(split, seed, index, _QUESTIONS), count)


def _groups(exchanges: list[Exchange], size: int = 2) -> list[list[Exchange]]:
    return [exchanges[i : i + size] for i in range(0, len(exchanges), size)]


def _dialogue(exchanges: list[Exchange]) -> Response:
    turns = [(Turn("user", said), Turn("assistant", answer)) for said, answer in exchanges]
    return Response(tuple(turn for pair in turns for turn in pair))


def _image(scene: Scene, split: str, seed: int, index: int, size: int) -> ImageRef:
    return ImageRef(name=scene_id(split, seed, index), data=png_bytes(scene, size))
