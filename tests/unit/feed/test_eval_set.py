import numpy as np
import pytest

from raydist.corpus.log import held_out
from raydist.feed import EvalSet, Feed, FeedSource
from raydist.feed.cache import pack_index_folder
from raydist.feed.eval_set import first_held_out
from raydist.job.schema import Packing

SHARDS = [[20, 7, 33, 5] * 8, [50, 1, 1, 90] * 8, [16] * 40]
PACKING = Packing(block_size=16)


def by_hash(log) -> list[tuple[int, np.ndarray]]:
    hashes = np.concatenate([shard.hashes() for shard in log.shards])
    documents = [row["input_ids"] for row in log.documents()]
    return sorted(zip(hashes.tolist(), documents, strict=True), key=lambda pair: pair[0])


def inputs(batches) -> list[list[int]]:
    return [ids.tolist() for batch in batches for ids in batch["input_ids"][batch["sample"] >= 0]]


def test_the_share_held_out_is_near_what_was_asked():
    hashes = np.random.default_rng(0).integers(0, 2**64, 200_000, np.uint64)
    for share in (0.0, 0.005, 0.3):
        assert abs(np.count_nonzero(held_out(hashes, share)) - 200_000 * share) < 5 * np.sqrt(
            200_000 * share + 1
        )
    assert held_out(hashes, 1.0).all()


def test_whole_documents_of_lowest_hash_up_to_max_tokens(make_log):
    log = make_log(SHARDS)
    ordered = by_hash(log)
    evaluated = EvalSet("a", log, PACKING, holdout=0.3, max_tokens=200)
    chosen = [ids for _, ids in ordered][: evaluated.n_documents]
    assert evaluated.n_documents > 1
    assert (
        evaluated.n_tokens == sum(map(len, chosen)) <= 200 < evaluated.n_tokens + len(ordered[len(chosen)][1])
    )
    assert evaluated.n_bytes == 4 * evaluated.n_tokens
    assert evaluated.n_labels == evaluated.n_tokens  # all but each first token, and the EOS
    stream = [token for ids in chosen for token in [*ids.tolist(), 0]]
    flat = [token for block in inputs(evaluated.batches(0, 1, 3)) for token in block]
    assert flat == stream + [0] * (evaluated.n_blocks * 16 - len(stream))


def test_batches_carry_the_lengths_of_their_documents(make_log):
    evaluated = EvalSet("a", make_log(SHARDS), PACKING, holdout=0.3, max_tokens=200)
    batches = list(evaluated.batches(0, 2, 3))
    assert len(batches) > 1
    for batch in batches:
        for lengths, positions in zip(batch["document_lengths"], batch["position_ids"], strict=True):
            restarted = [i for n in lengths.tolist() for i in range(n)]
            assert positions.tolist() == restarted


def test_training_and_evaluation_share_no_document(make_log):
    log = make_log(SHARDS)
    feed = Feed([FeedSource("a", log)], PACKING, 0, 0.2)
    trained = set(feed.batch(np.arange(feed.samples_per_epoch))["input_ids"].ravel().tolist()) - {0}
    evaluated = EvalSet("a", log, PACKING, holdout=0.2, max_tokens=1e9)
    tested = {token for block in inputs(evaluated.batches(0, 1, 4)) for token in block} - {0}
    assert trained.isdisjoint(tested)
    assert len(trained) + len(tested) == log.n_tokens
    assert evaluated.n_tokens == feed.sources[0].held_out_tokens
    assert evaluated.n_documents == feed.sources[0].held_out_documents


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_blocks_in_equally_many_batches(make_log, world_size):
    evaluated = EvalSet("a", make_log(SHARDS), PACKING, holdout=0.3, max_tokens=300)
    ranks = [list(evaluated.batches(rank, world_size, 2)) for rank in range(world_size)]
    assert len({tuple(len(batch["sample"]) for batch in batches) for batches in ranks}) == 1
    numbers = sorted(int(n) for batches in ranks for batch in batches for n in batch["sample"] if n >= 0)
    assert numbers == list(range(evaluated.n_blocks))
    labels = sum(int((batch["labels"] != -100).sum()) for batches in ranks for batch in batches)
    assert labels == evaluated.n_labels


def test_a_log_for_evaluation_only_gives_any_of_its_documents(make_log):
    log = make_log(SHARDS)
    assert EvalSet("e", log, PACKING, holdout=None, max_tokens=1e9).n_documents == log.n_documents


def test_at_least_one_document_however_few_tokens_are_asked_for(make_log):
    log = make_log(SHARDS)
    assert EvalSet("a", log, PACKING, holdout=0.3, max_tokens=1).n_documents == 1
    assert np.array_equal(first_held_out([log], 0.3), by_hash(log)[0][1])


def test_an_empty_one_says_so_and_gives_no_batches(make_log):
    log = make_log([[5, 5]])
    empty = EvalSet("a", log, PACKING, holdout=0.0, max_tokens=100)
    assert (empty.n_documents, empty.n_tokens, empty.n_bytes, empty.n_blocks) == (0, 0, 0, 0)
    assert list(empty.batches(0, 2, 4)) == []
    assert first_held_out([log], 0.0) is None


def test_the_choice_is_remembered_beside_the_logs(make_log):
    log = make_log(SHARDS)
    first = EvalSet("a", log, PACKING, holdout=0.3, max_tokens=200)
    assert list(pack_index_folder(log).glob("*-eval/*.pack"))
    again = EvalSet("a", log, PACKING, holdout=0.3, max_tokens=200)
    assert inputs(again.batches(0, 1, 4)) == inputs(first.batches(0, 1, 4))


def test_its_documents_begin_with_the_bos_that_training_adds(make_log):
    log = make_log(SHARDS)
    plain = EvalSet("a", log, PACKING, holdout=0.3, max_tokens=200)
    evaluated = EvalSet("a", log, PACKING, holdout=0.3, max_tokens=200, bos=7)
    chosen = [ids.tolist() for _, ids in by_hash(log)][: plain.n_documents]
    stream = [token for ids in chosen for token in [7, *ids, 0]]
    flat = [token for block in inputs(evaluated.batches(0, 1, 3)) for token in block]
    assert flat[: len(stream)] == stream
    assert (evaluated.n_tokens, evaluated.n_bytes) == (plain.n_tokens, plain.n_bytes)
    assert evaluated.n_labels == plain.n_labels + plain.n_documents  # each first token is predicted too
