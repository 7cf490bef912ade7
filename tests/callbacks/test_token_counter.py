"""Each token is counted once, also of a batch that is run again."""

from types import SimpleNamespace
from typing import Any

from tiny import LABELS, tiny_classifier, tiny_tokenizer, triplets

from dhrd_plugin import TripletCollator
from dhrd_plugin.callbacks.token_counter import TokenCounter, count_padding
from dhrd_plugin.models.composer_model import RETURN_REASONING_LOSS


def test_a_batch_that_did_not_fit_into_memory_is_counted_once():
    collate = TripletCollator(tiny_tokenizer(), LABELS)
    rows = triplets(8)
    batches = [{**collate(rows[i : i + 2]), RETURN_REASONING_LOSS: True} for i in range(0, 8, 2)]
    counter, state = TokenCounter(), SimpleNamespace(model=tiny_classifier())
    nobody: Any = None

    def begin(*microbatches):
        counter.before_train_batch(state, nobody)
        for state.batch in microbatches:
            counter.before_forward(state, nobody)

    for first, second in (batches[:2], batches[2:]):
        counter.batch_start(state, nobody)
        begin(first)  # and then an out-of-memory error
        begin(first, second)
    assert counter.ran.tolist() == sum(count_padding(batch) for batch in batches).tolist()
