"""The codebook: what is shipped, and what is wrong with one of a user's."""

import pytest
import yaml

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.correction.codebook import SHIPPED, load_codebook

OWN = {
    "errors": [{"name": "text", "level": "instance", "meaning": "words are read otherwise"}],
    "short_answers": ["Is {answer} right for {question}"],
    "answer_yes": "ja",
    "answer_no": "nein",
}


@pytest.fixture
def load(tmp_path):
    def load(**changes):
        path = tmp_path / "codebook.yaml"
        path.write_text(yaml.safe_dump(OWN | changes))
        return load_codebook(str(path))

    return load


def test_the_shipped_one_has_the_errors_of_the_paper():
    book = load_codebook(None)
    levels = {error.name: error.level for error in book.errors}
    assert levels == {
        "object": "instance",
        "attribute": "instance",
        "count": "instance",
        "scene": "image",
        "relation": "image",
    }
    assert book.answers == ("Yes", "No")
    assert book.short_answers
    assert all(error.example is not None for error in book.errors)


def test_a_model_is_told_kinds_meanings_and_examples_by_level():
    listing = load_codebook(None).listing()
    instance, heading, image = listing.partition("Errors about the image as a whole:")
    assert heading and instance.startswith("Errors about single things:\n- object: ")
    assert "- relation: " in image and "- object: " not in image
    assert '"Is there a cat on the sofa?" (yes) and "Is there a dog on the sofa?" (no)' in instance


def test_one_of_a_user(load):
    book = load()
    assert book.names == ("text",) and book.answers == ("ja", "nein")
    assert book.listing() == "Errors about single things:\n- text: words are read otherwise."


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"errors": []}, "errors: must not be empty"),
        ({"errors": OWN["errors"] * 2}, "errors: text stands twice"),
        ({"errors": [OWN["errors"][0] | {"name": "two words"}]}, "errors.0.name: "),
        ({"errors": [OWN["errors"][0] | {"level": "pixel"}]}, "errors.0.level: Input should be"),
        ({"errors": [OWN["errors"][0] | {"meaning": " "}]}, "errors.0.meaning: "),
        ({"errors": [OWN["errors"][0] | {"exmple": {}}]}, "did you mean example?"),
        (
            {"errors": [OWN["errors"][0] | {"example": {"wrong": "a"}}]},
            "errors.0.example.question_yes: ",
        ),
        ({"short_answers": ["Is {answer} right?"]}, "short_answers.0: it has no {question}"),
        ({"answer_no": "ja"}, "answer_no: it is the same as answer_yes"),
        ({"answers": "yes"}, "answers: unknown key; did you mean answer_"),
    ],
)
def test_what_cannot_be_used(load, changes, told):
    with pytest.raises(MmpoError) as caught:
        load(**changes)
    assert "codebook.yaml: this codebook cannot be used:" in str(caught.value)
    assert told in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MmpoError, match=r"none\.yaml: No such file"):
        load_codebook(str(tmp_path / "none.yaml"))


def test_the_file_is_one_of_a_user_too(tmp_path):
    """Whoever copies it can change it."""
    copy = tmp_path / "copy.yaml"
    with open(SHIPPED) as file:
        copy.write_text(file.read())
    assert load_codebook(str(copy)) == load_codebook(None)
