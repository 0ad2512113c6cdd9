"""The body of a request for chat completions, as OpenAI's clients and those of vLLM write it.

What is asked for and cannot be done is refused by name, as an answer without it would look like
one with it. What only keeps accounts of a request is taken and not read.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from mmpo_jax.generation.stepping import TOP

SEEDS = 2**64


class Body(pydantic.BaseModel):
    """A part of a request; unknown fields are refused."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class TextPart(Body):
    """Text within a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """Where an image is: a data URL."""

    url: str
    detail: str | None = None
    """Not read: how many tokens an image has is the model's choice."""


class ImagePart(Body):
    """An image within a message."""

    type: Literal["image_url"]
    image_url: ImageUrl
    uuid: str | None = None
    """Not read: vLLM keeps images by it."""


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(pydantic.BaseModel):
    """What one side says; fields beside those here are given to the chat template."""

    model_config = pydantic.ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[ContentPart, ...] | None = None


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Not read."""


class ChatBody(Body):
    """A request for chat completions."""

    model: str
    messages: tuple[Message, ...] = Field(min_length=1)
    n: int = Field(1, ge=1)
    temperature: float | None = Field(None, ge=0)
    """1 where nothing is said, as OpenAI has it."""
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    """vLLM's: 0 and -1 keep all tokens."""
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=SEEDS)
    stop: str | tuple[str, ...] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    continue_final_message: bool = False
    """vLLM's: the last message is the beginning of the answer."""
    add_generation_prompt: bool = True
    """vLLM's: whether the answer has a header of its own; the contrary of
    `continue_final_message`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template, such as `enable_thinking`."""

    # Known, and refused where they say anything.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    tools: tuple[Any, ...] | None = None
    tool_choice: Any = None
    modalities: tuple[str, ...] | None = None

    # Taken and not read.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    skip_special_tokens: Literal[True] | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens of an answer, at most, where the request says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer in front of them."""
        if self.stop is None:
            return ()
        return tuple(text for text in ([self.stop] if isinstance(self.stop, str) else self.stop))

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @pydantic.model_validator(mode="after")
    def _possible(self) -> ChatBody:
        neutral: dict[str, tuple[Any, ...]] = {
            "frequency_penalty": (None, 0),
            "presence_penalty": (None, 0),
            "repetition_penalty": (None, 1),
            "min_p": (None, 0),
            "logit_bias": (None, {}),
            "response_format": (None, {"type": "text"}),
            "tools": (None, ()),
            "tool_choice": (None, "none", "auto"),
            "modalities": (None, ("text",)),
        }
        for name, values in neutral.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: this server does not do that; leave it out")
        if "" in self.stops:
            raise ValueError("stop: an empty text would end every answer at once")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        last = self.messages[-1].role
        if self.continue_final_message == self.add_generation_prompt:
            raise ValueError(
                "continue_final_message: goes with add_generation_prompt: false, and only with it"
            )
        if self.continue_final_message != (last == "assistant"):
            raise ValueError(
                "messages: the last one is the assistant's where continue_final_message is true, "
                "and only there"
            )
        return self
