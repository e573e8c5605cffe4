"""The short rollback of speculative decoding: what one batch appended to a sequence can be taken back again."""

import pytest
from support.native import Token
from support.oracle import EXACT, Subject, difference, random_tokens

# A unified cache with no cell to spare: 2 sequences of sink + window, and one micro-batch, are 256 cells.
SINK, WINDOW, N_UBATCH = 4, 92, 64
N_DRAFT, N_BEFORE = 12, 300


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject.build("llama", 2, tmp_path_factory.mktemp("rollback"))


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "per-sequence"])
@pytest.mark.parametrize("accepted", [0, 5, N_DRAFT])
def test_draft_is_rolled_back_while_another_sequence_reads_a_prompt(subject, accepted, unified):
    """The prompt takes several micro-batches and, in a unified cache, all cells that the draft's check has freed."""
    spec = subject.spec(SINK, WINDOW, [0, 1])
    n_ctx = 1024 if unified else 2048
    context = subject.context(
        spec, n_ctx=n_ctx, n_batch=512, n_ubatch=N_UBATCH, n_seq_max=2, kv_unified=unified
    )
    tokens, prompt = random_tokens(N_BEFORE + 1 + N_DRAFT + 20, seed=1), random_tokens(400, seed=2)
    context.decode(tokens[:N_BEFORE])
    check = [Token(int(t), N_BEFORE + i, (0,)) for i, t in enumerate(tokens[N_BEFORE : N_BEFORE + 1 + N_DRAFT])]
    context.decode_batch(check + [Token(int(t), i, (1,), False) for i, t in enumerate(prompt)])

    kept = N_BEFORE + 1 + accepted
    assert context.seq_rm(0, kept, -1)
    after = context.decode(tokens[kept : kept + 20], start=kept)

    fresh = subject.context(spec, n_ctx=1024)
    expected = fresh.decode(tokens[: kept + 20])[kept:]
    context.close()
    fresh.close()
    assert difference(after, expected) < EXACT
