"""One checkpoint for all servers of the tests, and what `mmpo generate` says greedily."""

import pytest


@pytest.fixture(scope="session")
def checkpoint():
    from helpers import served

    return served.load()


@pytest.fixture(scope="session")
def service(checkpoint):
    """(the service, its URL), with room for 64 requests that come at once."""
    from helpers import served

    with served.service(checkpoint, max_samples=16, max_body_mb=1, max_megapixels=1) as made:
        yield made


@pytest.fixture(scope="session")
def greedy(checkpoint):
    """Function of (text, *pictures) of several prompts: their answers by `mmpo generate`."""
    import mmpo_jax as mm

    known = {}

    def greedy(asked):
        new = [one for one in dict.fromkeys(asked) if one not in known]
        records = [mm.record(text, images=pictures) for text, *pictures in new]
        options = {"temperature": 0, "max_new_tokens": 24, "batch_size": 16}
        texts = mm.generate(checkpoint, records, **options) if records else []
        known.update((one, text) for one, (text,) in zip(new, texts, strict=True))
        return [known[one] for one in asked]

    return greedy
