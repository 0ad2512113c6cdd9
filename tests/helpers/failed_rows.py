"""Rows that people brought and that once went wrong, by kind, each with variations.

Every row is for a model of `kinds.KINDS`, with what transformers would be given for it. Those whose
names are one word are as they were brought; the others vary what was wrong with them.
"""

from __future__ import annotations

import json
from typing import Any

from helpers.row_cases import (
    BAD,
    GOOD,
    IMAGE,
    LLAMA_FACTORY,
    ONE,
    TWO,
    Case,
    Q,
    assistant,
    message,
    pair,
    plain,
    user,
)

LENGTHS = {"prompt": [160], "response": [96]}
LIMITS = f"lengths={json.dumps(LENGTHS)}"
TEXT, LLAVA, QWEN = "qwen3", "llava", "qwen2_5_vl"
ROLES = "user", "assistant"
PICTURE = {"type": "image"}


def talk(*texts: str, begins: int = 0, **keys: Any) -> list[dict[str, Any]]:
    """Messages by turns; `begins` is who speaks first, `keys` are of the first answer."""
    turns = [plain(ROLES[(begins + n) % 2], text) for n, text in enumerate(texts)]
    turns[1 - begins] |= keys
    return turns


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


def dialogues(*whole: list[dict[str, Any]], shared: int = 1, **columns: Any) -> Case:
    """A pair of whole dialogues whose first messages are the prompt."""
    row = {"chosen": whole[0], "rejected": whole[1], **columns}
    return Case(
        row, in_parts(whole[0][:shared]), [in_parts(messages[shared:]) for messages in whole]
    )


def answers(prompt: str, *texts: str, **columns: Any) -> Case:
    """A pair, or other responses, to a text."""
    if not columns.keys() & {"responses", "label"}:
        columns |= dict(zip(("chosen", "rejected"), texts, strict=True))
    row = {"prompt": prompt, **columns}
    return Case(row, [user(prompt)], [[assistant(text)] for text in texts])


def samples(*texts: str, finished: list[bool] | None = None, prompt: str = "What?") -> Case:
    ended = {} if finished is None else {"finished": finished}
    return answers(prompt, *texts, responses=list(texts), **ended)


def shown(*pieces: Any, **columns: Any) -> Case:
    """A pair about pictures: the user's pieces are the row's too."""
    return pair([user(*pieces)], user(*pieces), **columns)


def factory(*messages: dict[str, Any], prompt: list[dict[str, Any]], **columns: Any) -> Case:
    row = {"conversations": list(messages), **LLAMA_FACTORY, **columns}
    return Case(row, prompt, [[assistant(GOOD)], [assistant(BAD)]])


def on(kind: str, cases: dict[str, Case]) -> dict[str, tuple[str, Case]]:
    """The cases, each with the kind of the model that it is for."""
    return {name: (kind, case) for name, case in cases.items()}


CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"x": 1}}}
OTHER_CALL = {"type": "function", "function": {"name": "erase", "arguments": {}}}
TOOLS = [{"type": "function", "function": {"name": "zoom", "parameters": {}}}]
STRUCK = "How is text struck out in HTML?"
HUMAN = {"from": "human", "value": "<image>What?"}
DOCUMENTED = "It shows <|im_start|>user, the text, and <|im_end|>. The order is "
THOUGHT = "<think>\nWhiskers.\n</think>\n\nA cat."
CHOSEN = talk("What?", "A cat.", "Sure?", "Yes")
REJECTED = talk("What?", "Two.", "Sure?", "No")

THINKING = on(
    TEXT,
    {
        "single": dialogues(talk("What?", "A cat."), talk("What?", "No.")),
        "multi_early": dialogues(CHOSEN, REJECTED),
        "three answers": dialogues(
            [*CHOSEN, *talk("Why?", "It has whiskers.")], [*REJECTED, *talk("Why?", "I guess.")]
        ),
        "after a prompt": Case(
            {"prompt": "What?", "chosen": CHOSEN[1:], "rejected": REJECTED[1:]},
            [user("What?")],
            [in_parts(CHOSEN[1:]), in_parts(REJECTED[1:])],
        ),
        "a system prompt in front": dialogues(
            [plain("system", "Be brief."), *CHOSEN],
            [plain("system", "Be brief."), *REJECTED],
            shared=2,
        ),
        "thoughts in the first answer": dialogues(talk("What?", THOUGHT, "Sure?", "Yes"), REJECTED),
        "thoughts beside the first answer": dialogues(
            talk("What?", GOOD, "Sure?", "Yes", reasoning_content="Ears."), REJECTED
        ),
    },
)
EOS_IN_TEXT = (
    on(
        LLAVA,
        {
            "0": answers(STRUCK, "<s>old</s> is right, use <s>.", "<s>old</s> is wrong."),
            "a verdict": answers(STRUCK, "<s>a</s> b", completion="<s>a</s> b", label=True),
            "cut, of a template without EOS": samples(
                "Use </s> and", "Use </s>.", finished=[False, True]
            ),
        },
    )
    | on(
        QWEN,
        {
            "eos_only": answers("What?", "<|im_end|>", "Two."),
            "eos_first": answers("What?", "<|im_end|>A cat.", "Two."),
            "eos_unfinished": samples(
                "ChatML ends with <|im_end|> and a new line", "Two.", finished=[False, True]
            ),
            "eos_chatml_doc": answers(Q, DOCUMENTED + "right.", DOCUMENTED + "wrong."),
            "at the end": answers("What?", "Two.<|im_end|>", "Two."),
            "in both answers of a dialogue": dialogues(
                talk("What?", "a <|im_end|> b", "Sure?", "c <|im_end|> d"), REJECTED
            ),
        },
    )
    | on(TEXT, {"a text model": answers("What?", "First<|im_end|>, then.", "First<|im_end|>.")})
)
KEYS_OF_MESSAGES = on(
    TEXT,
    {
        "reasoning": dialogues(
            talk("What?", GOOD, reasoning_content="I look closely."),
            talk("What?", GOOD, reasoning_content="I guess."),
        ),
        "toolcall_text": dialogues(
            talk("What?", "Let me look.", tool_calls=[CALL]),
            talk("What?", "Let me look.", tool_calls=[OTHER_CALL]),
        ),
        "tools": Case(
            {"prompt": Q, "chosen": GOOD, "rejected": BAD, "tools": TOOLS},
            [user(Q)],
            [[assistant(GOOD)], [assistant(BAD)]],
            {"tools": TOOLS},
        ),
        "system_col": pair(Q, message("system", "Speak."), user(Q), system="Speak."),
        "tools as JSON": Case(
            {"prompt": Q, "chosen": GOOD, "rejected": BAD, "tools": json.dumps(TOOLS)},
            [user(Q)],
            [[assistant(GOOD)], [assistant(BAD)]],
            {"tools": TOOLS},
        ),
        "a call and its result": Case(
            {
                "prompt": [
                    *talk("What?", "Let me look.", tool_calls=[CALL]),
                    plain("tool", "A cat's ear."),
                ],
                "chosen": GOOD,
                "rejected": BAD,
            },
            [
                user("What?"),
                assistant("Let me look.", tool_calls=[CALL]),
                message("tool", "A cat's ear."),
            ],
            [[assistant(GOOD)], [assistant(BAD)]],
        ),
        "calls of LLaMA-Factory": factory(
            {"from": "human", "value": "What?"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "A cat's ear."},
            prompt=[
                user("What?"),
                assistant("", tool_calls=[CALL]),
                message("tool", "A cat's ear."),
            ],
        ),
        "system beside ms-swift's messages": Case(
            {"messages": talk(Q, GOOD), "rejected_response": BAD, "system": "Speak."},
            [message("system", "Speak."), user(Q)],
            [[assistant(GOOD)], [assistant(BAD)]],
        ),
    },
) | on(
    QWEN,
    {
        **{
            f"an answer of {key} {value}": dialogues(
                talk("What?", "A bad answer.", "Sure?", "Yes", **{key: value}), REJECTED
            )
            for key, value in (("loss", False), ("weight", 0), ("train", False))
        }
    },
)
WHOLE_DIALOGUES = on(
    QWEN,
    {
        "uf1": dialogues(
            talk("What?", "A"),
            talk("What?", "B"),
            **{"prompt": "What?", "prompt_id": "a", "messages": talk("What?", "A")},
            **{"score_chosen": 8.0, "score_rejected": 3.0},
        ),
        "uf2_parts": Case(
            {
                "prompt": "What?",
                "chosen": [user(PICTURE, "What?"), assistant("A")],
                "rejected": [user(PICTURE, "What?"), assistant("B")],
                **ONE,
            },
            [user(IMAGE, "What?")],
            [[assistant("A")], [assistant("B")]],
        ),
        "what was asked last": dialogues(
            [*CHOSEN, *talk("Why?", "A")], [*CHOSEN, *talk("Why?", "B")], shared=5, prompt="Why?"
        ),
        "what was asked first": dialogues(
            [*CHOSEN, *talk("Why?", "A")], [*CHOSEN, *talk("Why?", "B")], shared=5, prompt="What?"
        ),
        "a prompt of messages": dialogues(
            talk("What?", "A"), talk("What?", "B"), prompt=[plain("user", "What?")]
        ),
        "a system prompt in the dialogues": dialogues(
            [plain("system", "Be brief."), *talk("What?", "A")],
            [plain("system", "Be brief."), *talk("What?", "B")],
            shared=2,
            prompt="What?",
        ),
        "a question": dialogues(talk("What?", "A"), talk("What?", "B"), question="What?"),
    },
)
TYPED_TAGS = (
    on(
        TEXT,
        {
            "html0": answers(
                "How do I embed a clip?", "Write <video> and </video> around it.", "No."
            ),
            "a picture's tag in a text model": answers("Is <image> HTML?", "<image/> is SVG.", BAD),
        },
    )
    | on(
        LLAVA,
        {
            "ph_answer": Case(
                {
                    "prompt": f"<image>\n{Q}",
                    "chosen": "Use the <image> tag.",
                    "rejected": BAD,
                    **ONE,
                },
                [user(IMAGE, Q)],
                [[assistant("Use the <image> tag.")], [assistant(BAD)]],
            ),
            "ph_text_only_html": answers("What does the <image> tag in SVG do?", GOOD, BAD),
            "ph_text_only_ans": answers(Q, "The <image> tag.", "Nothing."),
            "ph_parts_typed": shown(PICTURE, "How do I make this an <image> tag?", **ONE),
            "ans_image_start": Case(
                {"prompt": "Which tag?", "chosen": "<image>", "rejected": "<img>", **ONE},
                [user(IMAGE, "Which tag?")],
                [[assistant("<image>")], [assistant("<img>")]],
            ),
            "ans_image_end": answers("Which tag?", "It is <image>", "<img>"),
            "turn2_types_image": pair(
                [user(PICTURE, Q), *talk("A cat.", "Is <image> an HTML tag?", begins=1)],
                *(user(IMAGE, Q), assistant("A cat."), user("Is <image> an HTML tag?")),
                **ONE,
            ),
            "a clip's tag beside a picture": pair(
                "<image>Does <video> play?", user(IMAGE, "Does <video> play?"), **ONE
            ),
            "an escaped tag": pair(
                "<image>What is \\<image> in SVG?", user(IMAGE, "What is <image> in SVG?"), **ONE
            ),
        },
    )
    | on(
        QWEN,
        {
            "text_in_system_tag": pair(
                [plain("system", "The user sends <image> tags."), user(PICTURE, Q)],
                *(message("system", "The user sends <image> tags."), user(IMAGE, Q)),
                **ONE,
            ),
            "the model's own placeholder": answers("What is <|image_pad|>?", "<image>?", BAD),
        },
    )
)
EMPTY_IMAGES = on(
    QWEN,
    {
        "1": pair(Q, user(IMAGE, Q), image="0.png", images=[]),
        "a list of one": pair(Q, user(IMAGE, Q), image=["0.png"], images=[]),
        "a list of two": pair(Q, user(IMAGE, IMAGE, Q), image=["0.png", "1.png"], images=[]),
        "of LLaMA-Factory": factory(HUMAN, prompt=[user(IMAGE, "What?")], image="0.png", images=[]),
    },
) | on(LLAVA, {"of LLaVA": pair(Q, user(IMAGE, Q), image="0.png", images=[])})
PLACES = on(
    QWEN,
    {
        "ph_end": pair(f"{Q}\n<image>", user(f"{Q}\n", IMAGE), **ONE),
        "ph_end_parts": shown(Q, PICTURE, **ONE),
        "i_t_i": shown(PICTURE, "or rather", PICTURE, **TWO),
        "t_i_t_i": shown("First", PICTURE, "then", PICTURE, **TWO),
        "the second question": pair(
            [*talk("Hello", "Hi"), user(Q, PICTURE)],
            *(user("Hello"), assistant("Hi"), user(Q, IMAGE)),
            **ONE,
        ),
        "a part's own path": pair([user(Q, {"type": "image", "image": "0.png"})], user(Q, IMAGE)),
        "of LLaMA-Factory": factory(
            {"from": "human", "value": "Is <image> it?"}, prompt=[user("Is ", IMAGE, " it?")], **ONE
        ),
    },
)
EMPTY_SYSTEM = on(
    QWEN,
    {
        "lf_ok": factory(HUMAN, prompt=[user(IMAGE, "What?")], **ONE),
        "lf_system_empty": factory(HUMAN, prompt=[user(IMAGE, "What?")], system="", **ONE),
        "as a message": factory(
            {"from": "system", "value": ""}, HUMAN, prompt=[user(IMAGE, "What?")], **ONE
        ),
        "a verdict": Case(
            {
                "system": "",
                "conversations": [HUMAN, {"from": "gpt", "value": GOOD}],
                "kto_tag": True,
                **ONE,
            },
            [user(IMAGE, "What?")],
            [[assistant(GOOD)]],
        ),
        "to learn from": Case(
            {"system": "", "conversations": [HUMAN, {"from": "gpt", "value": GOOD}], **ONE},
            [user(IMAGE, "What?")],
            [[assistant(GOOD)]],
        ),
        "without a picture": factory(
            {"from": "human", "value": "What?"}, prompt=[user("What?")], system=""
        ),
    },
)
EMPTY_SAMPLES = (
    on(
        TEXT,
        {
            "1": samples("workings Helloolus", "isolate", "", finished=[False, False, True]),
            "2": samples("enric introduces", "", "rented", finished=[False, True, False]),
            "empty_one": samples("A cat.", "", "B."),
            "writes_tag": samples("Put <image> there.", "No.", prompt="How do I show a picture?"),
            "nothing else": samples("", ""),
        },
    )
    | on(
        QWEN,
        {
            "only white space": samples(" \n", "A cat. ", " B."),
            "as messages": Case(
                {"prompt": Q, "responses": [[plain("assistant", "")], [plain("assistant", GOOD)]]},
                [user(Q)],
                [[assistant("")], [assistant(GOOD)]],
            ),
        },
    )
    | on(LLAVA, {"of LLaVA": samples("", "A cat.")})
)

FOLDERS: dict[str, dict[str, tuple[str, Case]]] = {
    "01_thinking_template_kills_run": THINKING,
    "02_eos_text_cuts_answer": EOS_IN_TEXT,
    "03_message_keys_dropped": KEYS_OF_MESSAGES,
    "04_prompt_text_and_full_dialogues": WHOLE_DIALOGUES,
    "05_typed_image_or_video_tag": TYPED_TAGS,
    "06_image_and_empty_images": EMPTY_IMAGES,
    "07_image_moved_to_front": PLACES,
    "08_empty_system_llama_factory": EMPTY_SYSTEM,
    "13_generate_writes_empty_answers": EMPTY_SAMPLES,
}
