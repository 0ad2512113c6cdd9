"""Rows as people write them, and the dialogues that transformers would be given for them.

Every case is a row, the messages of its prompt, and those that each response adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMAGE = {"type": "image"}
Q, GOOD, BAD = "What is this?", "A cat.", "Two cats, I think."


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def message(role: str, *pieces: Any, **keys: Any) -> dict[str, Any]:
    """With its content in parts, as processors take it."""
    parts = [said(piece) if isinstance(piece, str) else piece for piece in pieces]
    return {"role": role, "content": parts, **keys}


def user(*pieces: Any) -> dict[str, Any]:
    return message("user", *pieces)


def assistant(*pieces: Any, **keys: Any) -> dict[str, Any]:
    return message("assistant", *pieces, **keys)


def plain(role: str, text: str, **keys: Any) -> dict[str, Any]:
    """With its content as a text."""
    return {"role": role, "content": text, **keys}


@dataclass(frozen=True)
class Case:
    """A row, and what transformers would be given for it."""

    row: dict[str, Any]
    prompt: list[dict[str, Any]]
    responses: list[list[dict[str, Any]]]
    arguments: dict[str, Any] | None = None


def pair(prompt: Any, *messages: dict[str, Any], **columns: Any) -> Case:
    row = {"prompt": prompt, "chosen": GOOD, "rejected": BAD, **columns}
    return Case(row, list(messages), [[assistant(GOOD)], [assistant(BAD)]])


ONE, TWO = {"images": ["0.png"]}, {"images": ["0.png", "1.png"]}
LLAMA_FACTORY = {
    "chosen": {"from": "gpt", "value": GOOD},
    "rejected": {"from": "gpt", "value": BAD},
}

TEXTS: dict[str, Case] = {
    "plain": pair(Q, user(Q)),
    "white space": pair(f"  {Q}\n\n", user(f"  {Q}\n\n")),
    "messages": pair([plain("user", Q)], user(Q)),
    "several turns": pair(
        [plain("user", "Hello"), plain("assistant", "Hi! "), plain("user", Q)],
        *(user("Hello"), assistant("Hi! "), user(Q)),
    ),
    "whole dialogues": Case(
        {
            "prompt": Q,
            "chosen": [plain("user", Q), plain("assistant", GOOD)],
            "rejected": [plain("user", Q), plain("assistant", BAD)],
        },
        [user(Q)],
        [[assistant(GOOD)], [assistant(BAD)]],
    ),
    "whole dialogues of alpaca": Case(
        {
            "instruction": Q,
            "system": "",
            "chosen": [plain("user", Q), plain("assistant", GOOD)],
            "rejected": [plain("user", Q), plain("assistant", BAD)],
        },
        [user(Q)],
        [[assistant(GOOD)], [assistant(BAD)]],
    ),
    "turns after the answer": Case(
        {
            "chosen": [
                *(plain("user", Q), plain("assistant", GOOD)),
                *(plain("user", "Sure?"), plain("assistant", "Yes.")),
            ],
            "rejected": [
                *(plain("user", Q), plain("assistant", BAD)),
                *(plain("user", "Sure?"), plain("assistant", "No.")),
            ],
        },
        [user(Q)],
        [
            [assistant(GOOD), user("Sure?"), assistant("Yes.")],
            [assistant(BAD), user("Sure?"), assistant("No.")],
        ],
    ),
    "by column": pair({"role": ["user"], "content": [Q]}, user(Q)),
    "query": Case(
        {"query": Q, "response": GOOD, "rejected_response": BAD, "history": [["Hello", "Hi"]]},
        [user("Hello"), assistant("Hi"), user(Q)],
        [[assistant(GOOD)], [assistant(BAD)]],
    ),
    "alpaca": Case(
        {"instruction": "Translate.", "input": Q, "chosen": GOOD, "rejected": BAD, "system": ""},
        [user(f"Translate.\n{Q}")],
        [[assistant(GOOD)], [assistant(BAD)]],
    ),
    "ms-swift": Case(
        {"messages": [plain("user", Q), plain("assistant", GOOD)], "rejected_response": BAD},
        [user(Q)],
        [[assistant(GOOD)], [assistant(BAD)]],
    ),
    "llama factory": Case(
        {"conversations": [{"from": "human", "value": Q}], "system": "", **LLAMA_FACTORY},
        [user(Q)],
        [[assistant(GOOD)], [assistant(BAD)]],
    ),
    "transcripts": Case(
        {
            "chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}",
        },
        [user(Q)],
        [[assistant(GOOD)], [assistant(BAD)]],
    ),
    "white space of transcripts": Case(
        {
            "chosen": f"\n\nHuman: {Q} \n\nAssistant: {GOOD}\n",
            "rejected": f"\n\nHuman: {Q} \n\nAssistant:  {BAD}",
        },
        [user(f"{Q} ")],
        [[assistant(f"{GOOD}\n")], [assistant(f" {BAD}")]],
    ),
    "samples": Case(
        {"prompt": Q, "responses": [GOOD, "", " x "]},
        [user(Q)],
        [[assistant(GOOD)], [assistant("")], [assistant(" x ")]],
    ),
    "HTML": Case(
        {
            "prompt": "Where goes <video> in a page?",
            "chosen": "<video> and <image>",
            "rejected": BAD,
        },
        [user("Where goes <video> in a page?")],
        [[assistant("<video> and <image>")], [assistant(BAD)]],
    ),
    "EOS in the answers": Case(
        {"prompt": Q, "chosen": "{EOS}First.{EOS} The rest.", "rejected": "First.{EOS}"},
        [user(Q)],
        [[assistant("{EOS}First.{EOS} The rest.")], [assistant("First.{EOS}")]],
    ),
    "EOS in the prompt": pair("What does {EOS} end?", user("What does {EOS} end?")),
}
SYSTEMS: dict[str, Case] = {
    "system": pair(
        [plain("system", "Be brief."), plain("user", Q)], message("system", "Be brief."), user(Q)
    ),
    "system column": pair(Q, message("system", "Be brief."), user(Q), system="Be brief."),
    "tag of the system": Case(
        {"prompt": [plain("system", "See <image>."), user(IMAGE, Q)], **ONE}
        | {"chosen": GOOD, "rejected": BAD},
        [message("system", "See <image>."), user(IMAGE, Q)],
        [[assistant(GOOD)], [assistant(BAD)]],
    ),
}
IMAGES: dict[str, Case] = {
    "nothing said": pair(Q, user(IMAGE, Q), **ONE),
    "two, nothing said": pair(Q, user(IMAGE, IMAGE, Q), **TWO),
    "tag in front": pair(f"<image>{Q}", user(IMAGE, Q), **ONE),
    "tag behind": pair(f"{Q}\n<image>", user(f"{Q}\n", IMAGE), **ONE),
    "tag in the middle": pair("Is <image> a cat?", user("Is ", IMAGE, " a cat?"), **ONE),
    "tags around": pair("<image> or rather <image>", user(IMAGE, " or rather ", IMAGE), **TWO),
    "part in front": pair([user(IMAGE, Q)], user(IMAGE, Q), **ONE),
    "part behind": pair([user(Q, IMAGE)], user(Q, IMAGE), **ONE),
    "parts between": pair(
        [user("First", IMAGE, "then", IMAGE, "which?")],
        user("First", IMAGE, "then", IMAGE, "which?"),
        **TWO,
    ),
    "part with its own path": pair([user(Q, {"type": "image", "image": "1.png"})], user(Q, IMAGE)),
    "key of a message": pair([plain("user", Q, image="1.png")], user(IMAGE, Q)),
    "keys of messages": pair(
        [
            plain("user", "Hello <image>", image="1.png"),
            plain("assistant", "Hi"),
            plain("user", Q, images=["0.png"]),
        ],
        *(user("Hello ", IMAGE), assistant("Hi"), user(IMAGE, Q)),
    ),
    "second question": pair(
        [user("Hello"), assistant("Hi"), user(IMAGE, Q)],
        *(user("Hello"), assistant("Hi"), user(IMAGE, Q)),
        **ONE,
    ),
    "tag in the second question": pair(
        [plain("user", "Hello"), plain("assistant", "Hi"), plain("user", f"{Q} <image>")],
        *(user("Hello"), assistant("Hi"), user(f"{Q} ", IMAGE)),
        **ONE,
    ),
    "both questions": pair(
        [user(IMAGE, Q), assistant(GOOD), user("And", IMAGE, "?")],
        *(user(IMAGE, Q), assistant(GOOD), user("And", IMAGE, "?")),
        **TWO,
    ),
    "after the answers": Case(
        {
            "prompt": [user(IMAGE, Q)],
            "chosen": [assistant(GOOD), user("And this: ", IMAGE), assistant("A dog.")],
            "rejected": [assistant(BAD), user("And this: ", IMAGE), assistant("A cow.")],
            **TWO,
        },
        [user(IMAGE, Q)],
        [
            [assistant(GOOD), user("And this: ", IMAGE), assistant("A dog.")],
            [assistant(BAD), user("And this: ", IMAGE), assistant("A cow.")],
        ],
    ),
    "tag in an answer": Case(
        {"prompt": Q, "chosen": "<image>", "rejected": BAD, **ONE},
        [user(IMAGE, Q)],
        [[assistant("<image>")], [assistant(BAD)]],
    ),
    "escaped tag": pair(
        r"<image>What is \<image> in SVG?",
        user(IMAGE, "What is <image> in SVG?"),
        **ONE,
    ),
    "tag beside a part": pair(
        [user(IMAGE, "an <image> tag")], user(IMAGE, "an <image> tag"), **ONE
    ),
    "llama factory image": Case(
        {"conversations": [{"from": "human", "value": f"<image>{Q}"}], **LLAMA_FACTORY, **ONE},
        [user(IMAGE, Q)],
        [[assistant(GOOD)], [assistant(BAD)]],
    ),
    "image beside empty images": pair(Q, user(IMAGE, Q), image="0.png", images=[]),
}
KEYS: dict[str, Case] = {
    "reasoning": Case(
        {
            "prompt": [plain("user", Q)],
            "chosen": [plain("assistant", GOOD, reasoning_content="I look closely.")],
            "rejected": [plain("assistant", GOOD, reasoning_content="I guess.")],
        },
        [user(Q)],
        [
            [assistant(GOOD, reasoning_content="I look closely.")],
            [assistant(GOOD, reasoning_content="I guess.")],
        ],
    ),
    "tool calls": Case(
        {
            "prompt": Q,
            "chosen": [
                plain(
                    "assistant",
                    "Let me look.",
                    tool_calls=[{"function": {"name": "zoom", "arguments": {"x": 1}}}],
                )
            ],
            "rejected": [
                plain(
                    "assistant",
                    "Let me look.",
                    tool_calls=[{"function": {"name": "erase", "arguments": {}}}],
                )
            ],
        },
        [user(Q)],
        [
            [
                assistant(
                    "Let me look.",
                    tool_calls=[{"function": {"name": "zoom", "arguments": {"x": 1}}}],
                )
            ],
            [
                assistant(
                    "Let me look.", tool_calls=[{"function": {"name": "erase", "arguments": {}}}]
                )
            ],
        ],
    ),
    "tools": Case(
        {
            "prompt": Q,
            "chosen": GOOD,
            "rejected": BAD,
            "tools": [{"type": "function", "function": {"name": "zoom", "parameters": {}}}],
        },
        [user(Q)],
        [[assistant(GOOD)], [assistant(BAD)]],
        {"tools": [{"type": "function", "function": {"name": "zoom", "parameters": {}}}]},
    ),
    "template arguments": Case(
        {
            "prompt": Q,
            "chosen": GOOD,
            "rejected": BAD,
            "chat_template_kwargs": {"enable_thinking": False},
        },
        [user(Q)],
        [[assistant(GOOD)], [assistant(BAD)]],
        {"enable_thinking": False},
    ),
}
