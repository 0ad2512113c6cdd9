"""Responses of a model behind a chat server: one that is up, or a copy of the round's own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from jax.sharding import Mesh

from mmpo_jax.alignment.served_copy import brought_up
from mmpo_jax.chat.replies import ChatFailure, Outcome
from mmpo_jax.chat.requests import ChatMessage, ChatRequest
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.chat.shared import AnyClient
from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core import progress
from mmpo_jax.core.files import fingerprint_items, fingerprint_json
from mmpo_jax.core.stages import Stage, StageOutput, run_stage
from mmpo_jax.data.records import IMAGE, MediaRef, Record, Turn, placed
from mmpo_jax.data.skipped import Problem
from mmpo_jax.feedback.judge import check_failed
from mmpo_jax.feedback.served import Servers
from mmpo_jax.generation.responses import GENERATED, PROMPTS_PER_PART
from mmpo_jax.recipes.candidates import ServedCandidates
from mmpo_jax.recipes.sampling import Decoding, Sampling

log = logging.getLogger(__name__)

SERVED_RULES = 2
"""Part of the key of responses: changes with how servers are asked for them, and in which parts."""

SERVED = GENERATED.append(pa.field("failure", pa.string()))
"""Columns of the stage. `token_ids` are null, and `num_tokens` is where the server does not count;
of a request that failed `text` is null and `failure` says why."""

ROLES = ("system", "user", "assistant")
"""Speakers that chat servers know."""


def unservable(record: Record) -> Problem | None:
    """Why a chat server cannot be asked a prompt; None where it can."""
    roles = [turn.role for turn in record.prompt]
    others = [role for role in roles if role not in ROLES]
    if others:
        return "template_refuses", f"chat servers know no turn of {others[0]}"
    if roles[-1:] != ["user"]:
        return "template_refuses", "chat servers answer a turn of the user's"
    if record.template or any(turn.keys for turn in record.prompt):
        return "template_refuses", "what its template is given beside texts cannot be sent"
    return None


def client_of(
    source: ServedCandidates, sampling: Sampling, servers: Servers, model: str
) -> AnyClient:
    """The client of a source's server.

    Args:
      source: whose server is asked.
      sampling: how it draws.
      servers: of the run.
      model: fingerprint of the round's model. A command's server has another in every round, and
        what one has answered is no answer of the next, nor of another command's.

    Raises:
      MmpoError: see `Servers.client`.
    """
    options = {name: getattr(source, name) for name in ChatServer.model_fields}
    if sampling.top_k:  # no field of the protocol, but of vLLM's and SGLang's
        options["extra_body"] = {"top_k": sampling.top_k, **source.extra_body}
    copy = "" if source.command is None else fingerprint_json([model, source.command])
    return servers.client(ChatServer(**options), copy)


def served_stage(
    source: ServedCandidates,
    records: Sequence[Record],
    sampling: Sampling,
    start: Checkpoint,
    mesh: Mesh,
    client: AnyClient,
    *,
    folder: str,
    seed: int,
    round_index: int,
    withheld: Collection[str],
    finished: Callable[[pa.Table], None] = lambda rows: None,
) -> StageOutput:
    """Samples of a source's server, as the stage `generate-NAME` of a round.

    The command's server is brought up when a part is missing, and taken down in the end, whatever
    that is. Every sample is a request with a seed of its own.

    Args:
      source: whose server is asked.
      records: prompts that it can be asked.
      sampling: how it draws.
      start: the round's model.
      mesh: its devices.
      client: see `client_of`.
      folder: of the round.
      seed: of the source.
      round_index: of the round.
      withheld: environment variables that the source's command does not get.
      finished: is given the responses as they come, see `run_stage`.

    Returns:
      The responses without those that failed, `GENERATED`; the file has a row per sample, `SERVED`.

    Raises:
      MmpoError: the server cannot be brought up or asked.
      TooManyFailed: more requests of a part failed than may.
    """
    copy = source.command is not None
    identity = client.server.identity()
    if copy:  # wherever it is up
        kept = ("model", "extra_body", "image_detail", "video_frames")
        identity = {name: identity.get(name) for name in kept} | {"command": source.command}
    inputs = {
        "prompts": fingerprint_items(
            [record.id, *_said(record), *(media.fingerprint() for media in record.media)]
            for record in records
        ),
    }
    if copy:
        inputs |= {"model": start.fingerprint, **start.processor.fingerprints()}
    settings = {
        "rules": SERVED_RULES,
        "server": identity,
        "decoding": sampling.model_dump(include=set(Decoding.model_fields)),
        "seed": seed,
        "round": round_index,
    }
    parts = max(1, -(-len(records) // PROMPTS_PER_PART))
    stage = Stage(folder, f"generate-{source.name}", inputs, settings, parts)

    with contextlib.ExitStack() as stack:

        @functools.cache
        def bring_up() -> None:
            stack.enter_context(brought_up(source, start, mesh, folder, client, withheld))

        def make_part(part: int) -> pa.Table:
            if copy:
                bring_up()
            # Equal to one prompt, as judges' parts: of a few left over one that fails is a lot.
            first, end = (len(records) * at // parts for at in (part, part + 1))
            activity.start_at(first * sampling.num_samples)
            progress.tell()
            return _sampled(source, records[first:end], sampling, client, [seed, round_index])

        total = len(records) * sampling.num_samples
        activity = stack.enter_context(progress.doing(stage.name, total, "responses"))
        output = run_stage(stage, make_part, lambda rows: finished(_answered(rows)))
    failures = Counter(filter(None, output.table["failure"].to_pylist()))
    if failures:
        told = ", ".join(f"{reason} {count}" for reason, count in failures.items())
        failed = f"{failures.total()} of {output.table.num_rows} responses failed ({told})"
        log.warning("candidates: %s: %s and are left out", source.name, failed)
    return dataclasses.replace(output, table=_answered(output.table))


def _answered(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.is_valid(rows["text"])).select(GENERATED.names)


def _said(record: Record) -> list[Any]:
    """What the turns of a prompt say, as JSON."""
    return [
        [turn.role, [piece if isinstance(piece, str) else piece.value for piece in _pieces(turn)]]
        for turn in placed(record.prompt, len(record.images), len(record.videos))
    ]


def _pieces(turn: Turn) -> Sequence[Any]:
    return (turn.content,) if isinstance(turn.content, str) else turn.content


def messages_of(record: Record) -> tuple[ChatMessage, ...]:
    """A prompt as a server is sent it, its images and videos where the turns have them."""
    images, videos = iter(record.images), iter(record.videos)

    def part(piece: Any) -> str | MediaRef:
        if isinstance(piece, str):
            return piece
        return next(images) if piece is IMAGE else next(videos)

    return tuple(
        ChatMessage(turn.role, tuple(part(piece) for piece in _pieces(turn)))  # type: ignore[arg-type]
        for turn in placed(record.prompt, len(record.images), len(record.videos))
    )


def _sampled(
    source: ServedCandidates,
    records: Sequence[Record],
    sampling: Sampling,
    client: AnyClient,
    seeds: Sequence[int],
) -> pa.Table:
    """The samples of some prompts.

    Args:
      source, records, sampling, client: see `served_stage`.
      seeds: what seeds of samples are made of beside prompt and number.

    Raises:
      TooManyFailed: more requests failed than may.
    """
    places = [(record, sample) for record in records for sample in range(sampling.num_samples)]
    messages = {record.id: messages_of(record) for record in records}
    requests = [
        ChatRequest(
            messages[record.id],
            sampling.max_new_tokens,
            sampling.temperature,
            sampling.top_p,
            seed=_sample_seed([*seeds, record.id, sample]),
        )
        for record, sample in places
    ]
    outcomes = client.ask(requests)
    failed = [isinstance(outcome, ChatFailure) for outcome in outcomes]
    client.reject([request for request, fails in zip(requests, failed, strict=True) if fails])
    rows = [
        _row(record.id, sample, outcome)
        for (record, sample), outcome in zip(places, outcomes, strict=True)
    ]
    option = f"candidates: {source.name}: max_failed"
    failures = [row["failure"] for row in rows]
    check_failed(failures, source.max_failed, f"asking {client.server.url}", option)
    return pa.Table.from_pylist(rows, schema=SERVED)


def _sample_seed(names: Sequence[int | str]) -> int:
    """A seed of 31 bits, which all servers take, of a sample's own."""
    return int(fingerprint_json(list(names))[:8], 16) >> 1


def _row(prompt_id: str, sample: int, outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt_id": prompt_id, "sample": sample, "failure": None}
    if isinstance(outcome, ChatFailure):
        return row | {"failure": outcome.reason}
    (text,), (finish,) = outcome.texts, outcome.finish_reasons
    return row | {
        "text": text,
        "num_tokens": outcome.completion_tokens,
        "finished": finish != "length",
    }
