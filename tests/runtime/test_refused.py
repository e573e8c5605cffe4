"""A sequence on which an operation was refused: it can't be decoded until it is removed as a whole."""

import pytest
from support.native import DecodeError
from support.oracle import Subject, random_tokens

N_TOKENS = 300


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject.build("llama", 2, tmp_path_factory.mktemp("refused"))


@pytest.fixture
def context(subject):
    """Sequence 1 is empty, and a copy of a part of sequence 0 into it was refused: the streaming layers have dropped it."""
    spec = subject.spec(4, 28, [0, 1])
    with subject.context(spec, n_ctx=1024, n_batch=512, n_ubatch=32, n_seq_max=2, kv_unified=True) as context:
        context.decode(random_tokens(N_TOKENS))
        context.seq_cp(0, 1, 0, 40)
        yield context


@pytest.mark.parametrize(
    "operation",
    [lambda c: c.seq_keep(1), lambda c: c.seq_rm(1, 40, -1), lambda c: c.seq_rm(-1, N_TOKENS, -1), lambda c: None],
    ids=["keep", "remove-the-rest", "remove-the-rest-of-all", "nothing"],
)
def test_stays_refused(context, operation):
    operation(context)
    with pytest.raises(DecodeError) as error:
        context.decode(random_tokens(1), start=40, seq=1)
    assert error.value.code < 0


@pytest.mark.parametrize("operation", [lambda c: c.seq_rm(1), lambda c: c.clear()], ids=["remove", "clear"])
def test_is_usable_again_after_it_is_removed(context, operation):
    operation(context)
    assert context.decode(random_tokens(8), seq=1).shape[0] == 8
