"""Claims about videos: a checkpoint's answers are transformers', a server is shown frames."""

import contextlib
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("av")
from helpers import clips, qwen_media  # noqa: E402
from helpers.chat_server import ChatTestServer, images, question, reply  # noqa: E402
from helpers.judged import responses_of  # noqa: E402
from helpers.kinds import KINDS, make_checkpoint  # noqa: E402
from helpers.meshes import one_device  # noqa: E402

from mmpo_jax.chat.client import ChatClient  # noqa: E402
from mmpo_jax.chat.server import ChatServer  # noqa: E402
from mmpo_jax.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from mmpo_jax.data.records import ImageRef, Record, Turn, VideoRef, placed  # noqa: E402
from mmpo_jax.data.tokenization import UNLIMITED, tokenize  # noqa: E402
from mmpo_jax.feedback.chat_labeler import ChatLabeler  # noqa: E402
from mmpo_jax.feedback.judges import unseen_by_judge  # noqa: E402
from mmpo_jax.feedback.labeler import CheckpointLabeler  # noqa: E402
from mmpo_jax.feedback.models import Models  # noqa: E402
from mmpo_jax.feedback.served import Servers  # noqa: E402
from mmpo_jax.recipes.feedback import (  # noqa: E402
    ChatLabeling,
    ClaimsFeedback,
    ImplicitFeedback,
    SourceFeedback,
)

QUESTIONS = ("Is there a ring? Please answer yes or no.", "Is it red? Please answer yes or no.")
FILE = VideoRef("clip.mp4", file=ImageRef("clip.mp4", clips.encode(12, 4, (56, 84))))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("qwen") / "model", KINDS["qwen2_5_vl"])


@pytest.fixture(scope="module")
def labeler(case):
    checkpoint = load_checkpoint(str(case.folder), one_device())
    return CheckpointLabeler(checkpoint, one_device(), None, batch_size=2)


@torch.no_grad()
def their_answer(case, video, text, yes_ids, no_ids):
    """(p(yes), p(no)) of transformers' model, which is given our frames."""
    turns = placed((Turn("user", text),), 0, 1)
    record = tokenize(Record("0", (), turns, (), (video,)), case.processor, UNLIMITED, 1)
    (layout,), (pixels,) = record.layouts, case.processor.pixels((), (video,))
    ids = record.prompt_ids
    is_video = ids == case.theirs.config.video_token_id
    patches = qwen_media.in_their_order(pixels, layout)
    assert is_video.sum() == len(patches) // 4 == 12
    logits = case.theirs(
        input_ids=torch.tensor(ids[None]).long(),
        mm_token_type_ids=torch.tensor(2 * is_video[None].astype(int)),
        pixel_values_videos=torch.tensor(patches),
        video_grid_thw=torch.tensor([[2, 4, 6]]),
        second_per_grid_ts=torch.tensor([1.0]),
    ).logits[0, -1]
    p = torch.softmax(logits.double(), -1).numpy()
    return p[list(yes_ids)].sum(), p[list(no_ids)].sum()


def test_answers_are_those_of_transformers(case, labeler):
    """Of 4 frames of 28 x 42, which nothing resizes: 2 steps of 2 x 3 tokens."""
    videos = [qwen_media.video(name, 42, 28, 4, rate) for name, rate in (("a", 2.0), ("b", 2.0))]
    videos[1] = videos[1].with_parts(reversed(videos[1].frames))
    answers = labeler.answer([(video.name, (video,), QUESTIONS) for video in videos])
    for video, given in zip(videos, answers, strict=True):
        for text, answer in zip(QUESTIONS, given, strict=True):
            expected = their_answer(case, video, text, labeler.yes_ids, labeler.no_ids)
            np.testing.assert_allclose(answer[:2], expected, rtol=2e-3)
    first, second = (np.array([answer[:2] for answer in given]) for given in answers)
    assert (np.abs(first - second) > 1e-3 * first).any()  # it sees the order of the frames


def test_files_and_images_beside_them(labeler):
    """An image in front of a video file, as a prompt has them."""
    image = qwen_media.IMAGES["grey"]
    shown = [(FILE,), (image,), (image, FILE)]
    answers = labeler.answer([(str(at), media, QUESTIONS) for at, media in enumerate(shown)])
    told = [tuple(answer.p_yes for answer in given) for given in answers]
    assert len(set(told)) == 3 and np.isfinite(told).all()


def test_a_server_is_shown_frames(tmp_path):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ChatTestServer(lambda body, seen: reply(body, "Yes")))
        address = {"url": server.url, "model": "judge", "video_frames": 3}
        client = stack.enter_context(ChatClient(ChatServer(**address), tmp_path / "journal"))
        labeler = ChatLabeler(client, ChatLabeling(**address, read="text"))
        image = qwen_media.IMAGES["grey"]
        (answers,) = labeler.answer([("a", (image, FILE), ("red?", "a ring?"))])
    assert [answer.p_yes for answer in answers] == [1.0, 1.0]
    assert sorted(map(question, server.bodies)) == ["a ring?", "red?"]
    for body in server.bodies:
        kinds = [kind for kind, _ in images(body)]
        assert kinds == ["image/png"] * 4
        assert body["messages"][0]["content"][-1]["type"] == "text"


def test_prompts_that_the_judge_cannot_see(case, tiny_folder, tmp_path):
    models = Models(None, "auto", Servers(str(tmp_path)), str(case.folder), "auto", 0)
    turns = (Turn("user", "What is this?"),)
    row = tokenize(Record("0", (), turns, (), (FILE,)), case.processor, UNLIMITED, 1)
    without = dataclasses.replace(row, videos=())
    served = {"type": "chat", "url": "http://host/v1", "model": "judge"}
    own, other = str(case.folder), str(tiny_folder)
    for feedback, sees in (
        (ClaimsFeedback(), True),
        (ClaimsFeedback.model_validate({"labeler": served}), True),
        (ClaimsFeedback.model_validate({"labeler": {"type": "checkpoint", "model": other}}), False),
        (ImplicitFeedback(policy=own, reference=own), True),
        (ImplicitFeedback(policy=own, reference=other), False),
        (SourceFeedback(order=("policy", "greedy")), True),
    ):
        unfit = unseen_by_judge(feedback, models)
        assert unfit(without) is None
        problem = unfit(row)
        assert (problem is None) == sees
        if not sees:
            assert problem == ("unsupported_video", f"{other}, which judges, takes no videos")


def test_verdicts_are_keyed_by_videos(tmp_path):
    def key(*media):
        images = tuple(one for one in media if isinstance(one, ImageRef))
        record = Record("0", images, (), (), tuple(one for one in media if one not in images))
        return responses_of(tmp_path, {"0": ["a"]}, records=[record]).media()

    image, other = qwen_media.IMAGES["grey"], qwen_media.video("b", 42, 28, 4, 2.0)
    keys = {key(), key(image), key(FILE), key(other), key(image, FILE)}
    assert len(keys) == 5 and key(FILE) == key(dataclasses.replace(FILE, name="other.mp4"))
