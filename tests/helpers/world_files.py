"""Files of prompts about the picture world, with responses of their own."""

import json
from pathlib import Path

from mmpo_jax.picture_world.records import prompt_records
from mmpo_jax.picture_world.world import sample_scene

CHOSEN, REJECTED = "there is a red star .", "there are two blue rings ."


def write_pairs(folder: Path, rows: int, blind: int = 0) -> Path:
    """Writes pairs with scores, and their images.

    Args:
      folder: of the file.
      rows: of it.
      blind: how many of the last rows show no image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, record in enumerate(prompt_records("align", 0, rows, 24)):
        name = f"{number}.png"
        (folder / name).write_bytes(record.images[0].read())
        shown = {"images": [name]} if number < rows - blind else {}
        line = {
            "id": record.id,
            **shown,
            "prompt": record.prompt[0].text,
            "chosen": CHOSEN,
            "rejected": REJECTED,
            "score_chosen": 3.0 + number,
            "score_rejected": 1.0,
            "answer": sample_scene("align", 0, number).to_dict(),
        }
        lines.append(json.dumps(line))
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(lines))
    return file
