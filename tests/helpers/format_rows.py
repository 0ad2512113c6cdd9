"""Rows as each tool writes them, and what tests of formats do with rows."""

import io
import json

from PIL import Image

from mmpo_jax.data.readers import iter_records, read_records
from mmpo_jax.data.records import Record, Response, Turn


def png(color="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), color).save(buffer, "png")
    return buffer.getvalue()


QUESTION = "What is this?"
PROMPT = (Turn("user", QUESTION),)
ALL_SIX = [-3.5, -0.7, [-1.0, -2.5], -9.0, -1.8, [-4.0, -5.0]]


PAIR = {"prompt": QUESTION, "chosen": "A cat.", "rejected": "A dog."}
IMAGE_PART = {"type": "image", "text": None}


def text_part(text):
    return {"type": "text", "text": text, "image": None}


def inner_folder(parent):
    """`data` with two images; a third lies outside of it."""
    folder = parent / "data"
    folder.mkdir()
    for path, color in ((folder / "a.png", "red"), (folder / "b.png", "blue")):
        path.write_bytes(png(color))
    (parent / "outside.png").write_bytes(png())
    return folder


def user(content=QUESTION):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


def answers(*texts, **fields):
    """Responses with the values at their places in each list."""
    return tuple(
        Response((Turn("assistant", text),), **{name: values[i] for name, values in fields.items()})
        for i, text in enumerate(texts)
    )


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_one(folder, row, **options) -> Record:
    (item,) = iter_records(write_jsonl(folder / "one.jsonl", [row]), **options)
    assert isinstance(item, Record), item
    return item


def skip_one(folder, row):
    records, skipped = read_records(write_jsonl(folder / "one.jsonl", [row]))
    assert records == []
    return skipped[0]


DIALOGUE = [user("1"), assistant("2"), user("3"), assistant("4")]
TRL = [
    {"prompt": [user()], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    {
        "prompt": [user()],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
        "score_chosen": 3.5,
        "score_rejected": 1.0,
        "margin": 2.5,
    },
    {"images": ["a.png", "b.png"], "prompt": [user()], "source": "mine", "category": {"n": 1}},
    {"images": ["a.png"], "prompt": [user()], "completion": [assistant("a")], "label": False},
    {"prompt": [{"role": "system", "content": "s"}, user()], "completion": [assistant("a")]},
    {"messages": DIALOGUE},
    {
        "videos": [{"frames": ["a.png", "b.png"], "fps": 2.0}],
        "prompt": DIALOGUE[:3],
        "responses": [[assistant("a")], [assistant("b")]],
        "finished": [True, False],
    },
]
LLAMA_FACTORY = [
    {
        "conversations": [human("<image>" + QUESTION)],
        "chosen": gpt("a"),
        "rejected": gpt("b"),
        "images": ["a.png"],
    },
    {
        "conversations": [human("<image><image>1"), gpt("2"), human("3")],
        "system": "Be brief.",
        "chosen": gpt("a"),
        "rejected": gpt("b"),
        "images": ["a.png", "b.png"],
        "note": "",
    },
    {"conversations": [human("1"), gpt("2"), human("3"), gpt("4")], "kto_tag": True},
    {"conversations": [human("1"), gpt("2"), human("3"), gpt("4")]},
    {"conversations": [human("<video>1"), gpt("2")], "videos": [["a.png", "b.png"]]},
    {"conversations": [human("1")]},
]
MS_SWIFT = [
    {
        "messages": [user("<image>" + QUESTION), assistant("a")],
        "images": ["a.png"],
        "rejected_response": "b",
    },
    {
        "messages": [user("<image>" + QUESTION), assistant("a")],
        "images": ["a.png"],
        "rejected_images": ["b.png"],
        "rejected_response": "a",
    },
    {
        "messages": [user("<image>1"), assistant("a")],
        "images": ["a.png"],
        "rejected_messages": [user("<image>2"), assistant("b")],
    },
    {"messages": DIALOGUE, "label": False, "channel": "x"},
    {"messages": DIALOGUE, "rejected_response": "5"},
]
MM_RLHF = [
    {
        "image": "short/c.png",
        "question": QUESTION,
        "answer": "gold",
        "models_output": ["a", "b", "c"],
        "helpfulness": [1.0, None, 3.0],
        "faithfulness": [None, None, 0.0],
        "final_ranking": [2, 1, 2],
        "score_reasons": ["so", None, "so so"],
        "ranking_reason": "why",
    },
    {
        "video": "video/clip",
        "question": QUESTION,
        "models_output": ["a", "b", "c", "d", "e"],
        "final_ranking": [5, 4, 3, 2, 1],
        "score_reasons": "one text for all",
    },
]
MM_RLHF_PAIRS = [
    {
        "id": "p",
        "image": "short/c.png",
        "prompt": QUESTION,
        "chosen": "a",
        "rejected": "b",
        "chosen_reason": "right",
        "rejected_reason": "wrong",
    },
    {
        "id": "p",
        "image": "short/c.png",
        "prompt": QUESTION,
        "chosen": "a",
        "rejected": "c",
        "chosen_reason": "right",
        "is_tie": True,
        "ls_factor": 1.0,
        "reference_chosen_logp": -1.5,
        "reference_rejected_logp": -2.5,
        "mix_reference_rejected_logp": -4.5,
    },
    {
        "id": "q",
        "image": "short/c.png",
        "prompt": QUESTION,
        "chosen": "a",
        "rejected": "b",
        "mixed_up_image": "b.png",
        "mix_reference_chosen_logp": -3.5,
    },
    {
        "id": "v",
        "video": "video/clip",
        "prompt": "x",
        "chosen": "a",
        "rejected": "b",
        "is_tie": True,
    },
]
RLAIF_V = [
    {
        "ds_name": "RLAIF-V",
        "image": {"bytes": png(), "path": "000.jpg"},
        "question": QUESTION,
        "chosen": "a",
        "rejected": "b",
        "origin_dataset": "COCO",
        "origin_split": '{"model": "llava15_7b", "type": "question answering"}',
        "idx": "0",
        "image_path": "000.jpg",
        "logps": json.dumps({"logps": ALL_SIX}),
    }
]
RLHF_V = [
    {
        "ds_name": "RLHF-V",
        "image": {"bytes": png(), "path": "000.jpg"},
        "text": json.dumps(
            {"question": QUESTION, "chosen": "a", "rejected": "b", "logps": ALL_SIX}
        ),
        "origin_dataset": "VQAv2",
        "origin_split": "{}",
        "idx": 7,
        "image_path": "000.jpg",
    }
]
VL_REWARDBENCH = [
    {
        "image": "a.png",
        "query": QUESTION,
        "response": ["A dog.", "A cat."],
        "human_ranking": ranking,
        "models": ["m", "n"],
        "query_source": "RLAIF-V",
    }
    for ranking in ([1, 0], [0, 1])
]
MULTIMODAL_REWARDBENCH = [
    {
        "ID": "Math7",
        "Category": "reasoning",
        "Image": "a.png",
        "Text": QUESTION,
        "Output1": "A dog.",
        "Output2": "A cat.",
        "Better": better,
    }
    for better in ("Output1", "Output2")
]


ROWS = {
    "trl": TRL,
    "llama_factory": LLAMA_FACTORY,
    "ms_swift": MS_SWIFT,
    "mm_rlhf": MM_RLHF,
    "mm_rlhf_pairs": MM_RLHF_PAIRS,
    "vl_rewardbench": VL_REWARDBENCH,
    "multimodal_rewardbench": MULTIMODAL_REWARDBENCH,
}


RANKED = {"question": QUESTION, "models_output": ["a", "b"], "final_ranking": [1, 2]}
SCORED = {"prompt": [user()], "responses": [{"turns": [assistant("abc")]}]}


def scored(**fields):
    return SCORED | {"responses": [SCORED["responses"][0] | fields]}
