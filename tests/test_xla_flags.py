"""A flag that XLA does not have would end the whole session without a word."""

from helpers import xla_flags


def test_what_the_jaxlib_does_not_have_is_not_set():
    kept = "--xla_backend_optimization_level=0"
    assert xla_flags.known((kept,)) == (kept,)
    assert xla_flags.known(("--xla_no_such=1", kept, "--xla_nor_this=true")) == (kept,)
    assert xla_flags.known(("--xla_no_such=1",)) == ()
