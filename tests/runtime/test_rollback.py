"""The short rollback of speculative decoding: what one batch appended to a sequence can be taken back again."""

import pytest
from support.oracle import EXACT, Subject
from support.transcript import Transcript

# A unified cache with no cell to spare: 2 sequences of sink + window, and one micro-batch, are 256 cells.
SINK, WINDOW, N_UBATCH = 4, 92, 64
N_DRAFT, N_BEFORE = 12, 300


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject.build("llama", 2, tmp_path_factory.mktemp("rollback"))


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "per-sequence"])
@pytest.mark.parametrize("accepted", [0, 5, N_DRAFT])
@pytest.mark.parametrize("prefill", ["stream", "full"])
def test_draft_is_rolled_back_while_another_sequence_reads_a_prompt(subject, prefill, accepted, unified):
    """The prompt takes several micro-batches and, in a unified cache, all cells that the draft's check has freed."""
    spec = subject.spec(SINK, WINDOW, [0, 1], prefill=prefill)
    n_ctx = 1024 if unified else 2048
    context = subject.context(spec, n_ctx=n_ctx, n_batch=512, n_ubatch=N_UBATCH, n_seq_max=2, kv_unified=unified)
    with context:
        drafter, reader = Transcript(subject, spec, context, 0), Transcript(subject, spec, context, 1)
        drafter.read(N_BEFORE)
        check = drafter.batch(1 + N_DRAFT, [True] * (1 + N_DRAFT))
        rows = context.decode_batch(check + reader.batch(400, [False] * 400))
        drafter.record(check, rows)

        assert drafter.rewind(N_BEFORE + 1 + accepted)
        drafter.decode(20)
        reader.read(10)
        assert drafter.difference() < EXACT and reader.difference() < EXACT


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "per-sequence"])
@pytest.mark.parametrize("accepted", [0, 30, 64])
@pytest.mark.parametrize("prefill", ["stream", "full"])
def test_draft_is_rolled_back_after_other_sequences_had_batches_of_their_own(subject, prefill, accepted, unified):
    """The check ends with the drafter's next batch, not with the batch that it was in; 64 drafted tokens are 65 in a batch."""
    spec = subject.spec(SINK, WINDOW, [0, 1], prefill=prefill)
    context = subject.context(spec, n_ctx=2048, n_batch=512, n_ubatch=128, n_seq_max=2, kv_unified=unified)
    with context:
        drafter, reader = Transcript(subject, spec, context, 0), Transcript(subject, spec, context, 1)
        drafter.read(N_BEFORE)
        drafter.decode(65, together=65)
        reader.read(400, n_batch=200)
        reader.decode(20)

        assert drafter.rewind(N_BEFORE + 1 + accepted)
        drafter.decode(20)
        reader.read(10)
        assert drafter.difference() < EXACT and reader.difference() < EXACT


def test_several_drafts_are_rolled_back_after_a_prompt_was_read(subject):
    spec = subject.spec(SINK, WINDOW, [0, 1], prefill="full")
    context = subject.context(spec, n_ctx=2048, n_batch=512, n_ubatch=64, n_seq_max=4, kv_unified=True)
    with context:
        drafters, reader = [Transcript(subject, spec, context, seq) for seq in range(3)], Transcript(subject, spec, context, 3)
        for drafter in drafters:
            drafter.read(N_BEFORE)
        checks = [drafter.batch(1 + N_DRAFT, [True] * (1 + N_DRAFT)) for drafter in drafters]
        rows = context.decode_batch([token for check in checks for token in check])
        for n, (drafter, check) in enumerate(zip(drafters, checks)):
            drafter.record(check, rows[n * len(check) : (n + 1) * len(check)])
        reader.read(400)

        for drafter in drafters:
            assert drafter.rewind(N_BEFORE + 1)
            drafter.decode(5)
            assert drafter.difference() < EXACT
        assert reader.difference() < EXACT
