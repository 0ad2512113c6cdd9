"""Where a result is uploaded to."""

from __future__ import annotations

import pydantic

from mmpo_jax.core.sections import Section


class Hub(Section):
    """A repository of the Hugging Face hub that gets the result, card included."""

    repo: str
    """Repository as `org/name`; made where it is not there. The token is that of `hf auth login`,
    or in the environment variable HF_TOKEN."""
    private: bool = True
    """Whether a repository that is made is private; one that is there stays what it is."""

    @pydantic.field_validator("repo")
    @classmethod
    def _check_repo(cls, repo: str) -> str:
        import huggingface_hub

        try:
            huggingface_hub.utils.validate_repo_id(repo)
        except huggingface_hub.errors.HFValidationError as error:
            raise ValueError(f"no name of a repository: {error}") from error
        if repo.count("/") != 1:
            raise ValueError("give an organisation, or your name, and the model: org/name")
        return repo
