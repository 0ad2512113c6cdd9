"""How a checkpoint is served: where, under which name, and how much at a time."""

from __future__ import annotations

from pydantic import Field

from mmpo_jax.core.sections import KeyVariable, NonNegativeInt, PositiveInt, Section


class Serving(Section):
    """A server of the chat-completions protocol, and its limits."""

    host: str = "127.0.0.1"
    """Address that it listens on; by default this machine alone reaches it."""
    port: int = Field(8000, ge=0, lt=2**16, strict=True)
    """Port; 0 takes a free one, which is told."""
    name: str | None = Field(None, min_length=1)
    """Name of the model in requests; by default that of its folder."""
    api_key_env: KeyVariable | None = None
    """Name of the environment variable with the key that clients have to give; None asks for
    none."""
    max_samples: PositiveInt = 16
    """Samples that are decoded at a time."""
    max_requests: PositiveInt = 256
    """Requests at a time, those that wait included; more are refused with 429."""
    max_choices: PositiveInt = 64
    """Samples that a request may ask for."""
    max_prompt_tokens: PositiveInt = 4096
    """Tokens of a prompt, those of images included; longer ones are refused."""
    max_new_tokens: PositiveInt = 2048
    """Tokens of a response, and what requests that say nothing get; those that ask for more are
    cut here."""
    max_body_mb: PositiveInt = 64
    """Size of a request's body in MiB."""
    max_held_mb: PositiveInt = 4096
    """Size in MiB of the bodies of all requests that are not answered yet; those for which there is
    no room are refused with 429."""
    max_images: NonNegativeInt = 16
    """Images of a request."""
    max_megapixels: PositiveInt = 50
    """Size of an image in millions of pixels."""
    drain_seconds: NonNegativeInt = 60
    """Seconds that requests have to end in once the server is told to end."""
