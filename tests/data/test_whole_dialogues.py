"""Answers that are whole dialogues: what they repeat of the row's prompt is said once."""

import pytest
from helpers.format_rows import QUESTION, answers, assistant, read_one, skip_one, user

from mmpo_jax.data.records import Turn

EARLIER = [user("Hello"), assistant("Hi")]


def sides(*turns):
    """Both responses as dialogues that begin with these turns."""
    return {"chosen": [*turns, assistant("a")], "rejected": [*turns, assistant("b")]}


def turns_of(messages):
    return tuple(Turn(message["role"], message["content"]) for message in messages)


ASKED = {
    "alpaca": {"instruction": QUESTION},
    "query": {"query": QUESTION},
    "trl": {"prompt": QUESTION},
    "llama_factory": {"conversations": [user()]},
}


@pytest.mark.parametrize("before", [[], EARLIER], ids=["alone", "asked last"])
@pytest.mark.parametrize("name", ASKED)
def test_pairs(folder, name, before):
    record = read_one(folder, ASKED[name] | sides(*before, user()))
    assert record.prompt == turns_of([*before, user()])
    assert record.responses == answers("a", "b", rank=[1, 2])


@pytest.mark.parametrize("name", ASKED)
def test_another_prompt(folder, name):
    assert skip_one(folder, ASKED[name] | sides(user("2"))).reason == "prompt_differs"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": QUESTION, "output": [user(), assistant("a")]},
        {"query": QUESTION, "response": [user(), assistant("a")]},
        {"query": QUESTION, "response": [user(), assistant("a")], "label": True},
        {"prompt": QUESTION, "completion": [user(), assistant("a")], "label": True},
        {"prompt": QUESTION, "responses": [[user(), assistant("a")]]},
    ],
)
def test_single_answers(folder, row):
    record = read_one(folder, row)
    assert record.prompt == (Turn("user", QUESTION),)
    assert [response.turns for response in record.responses] == [(Turn("assistant", "a"),)]
    dialogue = [user("2"), assistant("a")]
    column = next(name for name in row if name in ("output", "response", "completion", "responses"))
    other = row | {column: [dialogue] if column == "responses" else dialogue}
    assert skip_one(folder, other).reason == "prompt_differs"


def test_an_answer_of_several_turns(folder):
    """The prompt is what the dialogue begins with, not what was asked last in it."""
    dialogue = [user(), assistant("a"), user("2"), assistant("b")]
    record = read_one(folder, {"prompt": QUESTION, "completion": dialogue})
    assert record.prompt == (Turn("user", QUESTION),)
    assert record.responses[0].turns == turns_of(dialogue[1:])


def test_a_longer_history(folder):
    row = {"query": QUESTION, "history": [["Hello", "Hi"]]}
    record = read_one(folder, row | sides(*EARLIER, user()))
    assert record.prompt == turns_of([*EARLIER, user()])
    assert skip_one(folder, row | sides(user())).reason == "prompt_differs"


def test_system_prompts(folder):
    system = {"role": "system", "content": "Be brief."}
    row = {"instruction": QUESTION, "system": "Be brief."}
    for begins in ([user()], [system, user()]):
        record = read_one(folder, row | sides(*begins))
        assert record.prompt == turns_of([system, user()])
    alone = {"prompt": [system], "completion": [user(), assistant("a")]}
    assert read_one(folder, alone).prompt == turns_of([system, user()])
    llama_factory = {"conversations": [system, user()]}
    other = sides({"role": "system", "content": "Be long."}, user())
    assert skip_one(folder, llama_factory | other).reason == "prompt_differs"


def test_responses_with_other_prompts_are_left_out_alone(folder):
    dialogues = [[user(), assistant("a")], [*EARLIER, user(), assistant("b")], assistant("c")]
    record = read_one(folder, {"prompt": QUESTION, "responses": dialogues})
    assert [response.text for response in record.responses] == ["a", "c"]
    assert [(place, reason) for place, reason, _ in record.left_out] == [(1, "prompt_differs")]


def test_a_rejected_response_of_ms_swift(folder):
    row = {"messages": [user(), assistant("a")], "rejected_response": [user(), assistant("b")]}
    assert read_one(folder, row).responses == answers("a", "b", rank=[1, 2])
    other = row | {"rejected_response": [user("2"), assistant("b")]}
    assert read_one(folder, other).responses[1].prompt == (Turn("user", "2"),)


def test_what_goes_on_behind_an_answer_is_kept(folder):
    """A tool's reply behind a call is not a dialogue from its beginning."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    reply = {"role": "tool", "content": "3"}
    record = read_one(folder, {"prompt": [user(), call], **sides(reply)})
    roles = [turn.role for turn in (*record.prompt, *record.responses[0].turns)]
    assert roles == ["user", "assistant", "tool", "assistant"]
    record = read_one(folder, {"prompt": EARLIER, **sides(user("2"))})
    texts = [turn.text for turn in (*record.prompt, *record.responses[0].turns)]
    assert texts == ["Hello", "Hi", "2", "a"]


def test_transcripts_are_kept_to_the_letter(folder):
    """But for a space behind the colon, as HH-RLHF writes it."""
    row = {side: f"\n\nHuman: 1 \n\nAssistant:  {side}\n" for side in ("chosen", "rejected")}
    record = read_one(folder, row)
    assert record.prompt == (Turn("user", "1 "),)
    assert record.responses == answers(" chosen\n", " rejected\n", rank=[1, 2])
    bare = {side: f"\n\nHuman:1\n\nAssistant:{side}" for side in ("chosen", "rejected")}
    assert read_one(folder, bare).responses == answers("chosen", "rejected", rank=[1, 2])


def picture(name=None):
    return {"type": "image"} if name is None else {"type": "image", "image": name}


def shown(*pictures):
    return user([*pictures, {"type": "text", "text": QUESTION}])


@pytest.mark.parametrize(
    ("ours", "theirs", "names"),
    [
        ([picture("a.png")], [picture("a.png")], ["a.png"]),
        ([picture("a.png")], [{"type": "image_url", "image_url": {"url": "a.png"}}], ["a.png"]),
        ([picture("a.png")], [picture()], ["a.png"]),
        ([picture()], [picture("b.png")], ["b.png"]),
        ([picture("a.png"), picture()], [picture(), picture("b.png")], ["a.png", "b.png"]),
        ([picture("a.png")], [picture("b.png")], None),
        ([picture("a.png"), picture()], [picture("b.png"), picture()], None),
        ([picture()], [{"type": "video", "video": "video/clip"}], None),
    ],
)
def test_pictures_that_both_name(folder, ours, theirs, names):
    rows = [
        {"prompt": [shown(*ours)], **sides(shown(*theirs))},
        {"prompt": [shown(*ours)], "completion": [shown(*theirs), assistant("a")]},
    ]
    for row in rows:
        if names is None:
            assert skip_one(folder, row).reason == "prompt_differs"
        else:
            assert [image.name for image in read_one(folder, row).images] == names
