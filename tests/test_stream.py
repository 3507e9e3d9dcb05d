"""Far past its context the demo model stays as good as inside it: a ring with sinks, over a stream of 3 contexts.

The demo model hardly looks at its sinks; that they are seen as they should be is held in `test_cache_attention.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
from demo.plot_stream import context_losses, stream_losses, stream_tokens


@pytest.mark.slow
def test_the_loss_of_a_long_stream_is_that_of_fresh_contexts(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    tokens = stream_tokens(tokenizer, 3 * model.config.context_length + 1)
    fresh, stream = context_losses(model, tokens), stream_losses(model, tokens, keep=4)
    later = stream[model.config.context_length :]
    assert (later.mean() <= 1.1 * fresh.mean()).item()
    assert (stream.mean() <= 1.1 * fresh.mean()).item()
