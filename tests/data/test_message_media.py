"""Pictures that messages name by keys of their own, and keys that say nothing."""

import base64

import pytest
from helpers.format_rows import QUESTION, assistant, png, read_one, skip_one, user, write_jsonl

from mmpo_jax.commands.data_convert import convert_data
from mmpo_jax.data.notes import Notes
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.records import IMAGE, VIDEO, placed

PAIR = {"chosen": "a", "rejected": "b"}
PART = {"type": "image"}


def text(said):
    return {"type": "text", "text": said}


def png_text(color="red"):
    return base64.b64encode(png(color)).decode()


def shown(folder, *messages, **columns):
    """(contents of the prompt's turns with their media, names of the images) of a row."""
    record = read_one(folder, {"prompt": list(messages), **PAIR, **columns})
    assert all(not turn.keys for turn in record.prompt)
    turns = placed(record.prompt, len(record.images), len(record.videos))
    return [turn.content for turn in turns], [image.name for image in record.images]


@pytest.mark.parametrize(
    ("message", "content", "names"),
    [
        (user() | {"image": "a.png"}, (IMAGE, QUESTION), ["a.png"]),
        (user() | {"images": ["b.png", "a.png"]}, (IMAGE, IMAGE, QUESTION), ["b.png", "a.png"]),
        (user() | {"image": "a.png", "images": []}, (IMAGE, QUESTION), ["a.png"]),
        (user() | {"images": [{"path": "a.png"}]}, (IMAGE, QUESTION), ["a.png"]),
        (user() | {"image": "a.png", "images": ""}, (IMAGE, QUESTION), ["a.png"]),
        (user() | {"image": "", "images": [], "video": ""}, QUESTION, []),
        ({"role": "user", "image": "a.png"}, (IMAGE,), ["a.png"]),
        (user("Is <image> it?") | {"image": "a.png"}, ("Is ", IMAGE, " it?"), ["a.png"]),
        (user(r"What is \<image>?") | {"image": "a.png"}, (IMAGE, "What is <image>?"), ["a.png"]),
        (user([text("Is "), PART]) | {"image": "b.png"}, ("Is ", IMAGE), ["b.png"]),
        (user([text("Is it?")]) | {"image": "b.png"}, (IMAGE, "Is it?"), ["b.png"]),
    ],
)
def test_pictures_of_a_message(folder, message, content, names):
    assert shown(folder, message) == ([content], names)


def test_pictures_of_a_later_message(folder):
    messages = [user("1"), assistant("2"), user("3") | {"image": "a.png"}]
    assert shown(folder, *messages) == (["1", "2", (IMAGE, "3")], ["a.png"])
    # A column may say the same again.
    assert shown(folder, *messages, images=["a.png"])[1] == ["a.png"]


def test_a_line_break_behind_a_tag_is_one_of_tags(folder):
    row = {"prompt": [user("<image>\n" + QUESTION) | {"image": "a.png"}], **PAIR}
    (turn,) = read_one(folder, row).prompt
    plain = read_one(folder, {"prompt": turn.text.join(["<image>", ""]), "image": "a.png", **PAIR})
    assert turn.tagged and turn == plain.prompt[0]


def test_a_column_beside_what_messages_name(folder):
    """Says it again, or names what is at the other places; other pictures are not lost."""
    one, two = user("<image>hi") | {"image": "a.png"}, user("<image>and")
    asked = [one, assistant("2"), two]
    for column in (["b.png"], ["a.png", "b.png"]):
        contents, names = shown(folder, *asked, images=column)
        assert names == ["a.png", "b.png"]
        assert [contents[0], contents[2]] == [(IMAGE, "hi"), (IMAGE, "and")]
    named = user([{"type": "image", "image": "a.png"}, text("hi")])
    same = {"images": [{"base64": base64.b64encode((folder / "a.png").read_bytes()).decode()}]}
    assert shown(folder, named, **same)[1] == ["a.png"]
    for messages, column in [
        (asked, []),
        (asked, ["b.png", "a.png"]),
        ([user() | {"image": "a.png"}], ["b.png"]),
        ([named], ["b.png"]),
        ([named], [{"base64": png_text("green")}]),
    ]:
        row = {"prompt": messages, "images": column, **PAIR}
        assert skip_one(folder, row).reason == "placeholder_count"


def test_videos_of_a_column_beside_those_of_messages(folder):
    row = {"prompt": [user([{"type": "video", "video": "video/clip"}, text("?")])], **PAIR}
    again = {"videos": [{"frames": "video/clip", "fps": 2.0}]}
    assert read_one(folder, row | again).videos[0].fps == 2
    other = {"videos": [["video/clip/f2.png", "a.png"]]}
    assert skip_one(folder, row | other).reason == "placeholder_count"


@pytest.mark.parametrize("place", range(3))
def test_escapes_are_alike_in_all_turns(folder, place):
    messages = [user(r"1 \<image>"), assistant("2"), user(r"3 \<image>"), assistant("4")]
    messages.append(user([text(r"5 \<image>")]))
    messages[2 * place] |= {"image": "a.png"}
    contents, _ = shown(folder, *messages)
    said = [content if isinstance(content, str) else content[-1] for content in contents]
    assert said == ["1 <image>", "2", "3 <image>", "4", "5 <image>"]


def test_escapes_beside_a_key_and_parts(folder):
    """Tags are text there, escaped or not."""
    named = {"type": "image", "image": "b.png"}
    keyed = user(r"\<image>?") | {"image": "a.png"}
    messages = [user([named, text(r"\<image> <image>")]), assistant("2"), keyed]
    contents, names = shown(folder, *messages)
    assert contents == [(IMAGE, "<image> <image>"), "2", (IMAGE, "<image>?")]
    assert names == ["b.png", "a.png"]


def test_videos_of_a_message(folder):
    record = read_one(folder, {"prompt": [user() | {"video": "video/clip"}], **PAIR})
    assert placed(record.prompt, 0, 1)[0].content == (VIDEO, QUESTION)
    assert len(record.videos[0].frames) == 2


def test_pictures_that_cannot_be_meant(folder):
    def reason(*messages):
        return skip_one(folder, {"prompt": list(messages), **PAIR}).reason

    assert reason(user("<image> <image>") | {"image": "a.png"}) == "placeholder_count"
    assert reason(user([PART, PART]) | {"image": "a.png"}) == "placeholder_count"
    assert reason(user() | {"image": "gone.png"}) == "image_missing"
    answer = assistant("2") | {"image": "a.png"}
    assert reason(user("1"), answer, user("3")) == "image_position"


@pytest.mark.parametrize("again", [{"images": ["a.png"]}, {"image": "./a.png"}])
def test_keys_that_repeat_the_parts(folder, again):
    named = {"type": "image", "image": "a.png"}
    assert shown(folder, user([text("Is "), named]) | again) == ([("Is ", IMAGE)], ["a.png"])
    others = [{"image": "b.png"}, {"images": ["a.png", "a.png"]}, {"image": {"data": png_text()}}]
    for other in others:
        row = {"prompt": [user([named, text("?")]) | other], **PAIR}
        assert skip_one(folder, row).reason == "placeholder_count"


def test_videos_that_the_parts_name_beside_an_image_of_a_key(folder):
    named = {"type": "video", "video": "video/clip"}
    message = user([named, text("?")]) | {"video": "video/clip", "image": "a.png"}
    assert shown(folder, message) == ([(IMAGE, VIDEO, "?")], ["a.png"])


def test_they_are_written_as_pictures_of_the_row(folder):
    row = {"prompt": [user("1"), assistant("2"), user("3") | {"image": "a.png"}], **PAIR}
    source = write_jsonl(folder / "rows.jsonl", [row])
    convert_data(str(source), str(folder / "out.jsonl"), format="trl")
    (before,), _ = read_records(source)
    (after,), _ = read_records(folder / "out.jsonl")
    assert (after.prompt, len(after.images)) == (before.prompt, 1)


def test_keys_that_say_nothing(folder):
    empty = user("") | {"timestamp": 3}
    assert skip_one(folder, {"prompt": [empty], **PAIR}).reason == "empty_prompt"
    silent = [assistant("") | {"meta": "x"}]
    row = {"prompt": QUESTION, "chosen": silent, "rejected": "b"}
    assert skip_one(folder, row).reason == "empty_response"
    thought = [assistant("") | {"reasoning_content": "So."}]
    assert read_one(folder, row | {"chosen": thought}).responses[0].turns[0].keys


@pytest.mark.parametrize("calls", ["", " ", "null", None])
def test_calls_that_say_nothing(folder, calls):
    row = {"prompt": QUESTION, "chosen": [assistant("a") | {"tool_calls": calls}], "rejected": "b"}
    assert not read_one(folder, row).responses[0].turns[0].keys
    row["chosen"] = [assistant("") | {"tool_calls": calls}]
    assert skip_one(folder, row).reason == "empty_response"


def test_keys_that_look_like_pictures_are_told(folder):
    path = write_jsonl(folder / "rows.jsonl", [{"prompt": [user() | {"img": "a.png"}], **PAIR}])
    notes = Notes()
    read_records(path, notes=notes)
    (warning,) = notes.warnings()
    assert "img 1" in warning


def test_a_column_of_another_name_stands_back(folder):
    """The messages have the row's pictures."""
    row = {"prompt": [user() | {"image": "a.png"}], "img_path": "b.png", **PAIR}
    assert [image.name for image in read_one(folder, row).images] == ["a.png"]
