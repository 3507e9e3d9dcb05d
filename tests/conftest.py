"""Models that many tests share: the demo, loaded once, and a random one."""

from __future__ import annotations

import gc
import os
import random
import signal
import tempfile
from collections.abc import Generator, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import mlx.core as mx
import pytest
from hypothesis import settings
from mlx.utils import tree_map

import mlxqwen
from mlxqwen.engine.engine import Engine
from mlxqwen.files.config import GenerationConfig, ModelConfig
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tests.serving import Served

# Fewer than Hypothesis's hundred, for the whole run to stay short; tests that need more say so.
settings.register_profile("mlxqwen", max_examples=50, deadline=None)
settings.load_profile("mlxqwen")

# Programs that a background job starts ignore Ctrl-C; those that the tests start are to hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The server's libraries are an extra of their own.
if find_spec("starlette") is None:
    collect_ignore_glob = ["test_server_*.py"]

# No test leaves anything in the cache of whoever runs it.
_CACHE = tempfile.TemporaryDirectory(prefix="mlxqwen-tests-")
os.environ["MLXQWEN_CACHE"] = _CACHE.name
os.environ["XDG_STATE_HOME"] = f"{_CACHE.name}/state"  # where chats keep their history
os.environ["XDG_CONFIG_HOME"] = f"{_CACHE.name}/config"  # where a user's defaults would be
os.environ.pop("MLXQWEN_MODEL", None)

VOCAB_SIZE = 97
CONTEXT = 64


@pytest.fixture(autouse=True)
def _draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn without a seed is drawn by the test's name: a test that passes once passes again."""
    drawn = random.Random(request.node.nodeid)
    monkeypatch.setattr("mlxqwen.sampling.sampler.secrets.randbits", drawn.getrandbits)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Thousands of tests are no garbage: looking through them took a third of the time to collect them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def random_model(
    generation_config: GenerationConfig | None = None,
    *,
    vocab_size: int = VOCAB_SIZE,
    context: int = CONTEXT,
    layers: int = 2,
    eos_token_ids: Sequence[int] = (),
) -> Qwen3ForCausalLM:
    """Layers of random float32 weights, large enough that the likeliest token changes from step to step."""
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen3",
            "hidden_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 48,
            "vocab_size": vocab_size,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": False,
            "eos_token_id": list(eos_token_ids),
        }
    )
    model = Qwen3ForCausalLM(config, generation_config)
    keys = iter(mx.random.split(mx.random.key(0), 64))
    model.update(tree_map(lambda array: mx.random.normal(array.shape, key=next(keys)) * 0.5, model.parameters()))
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="session")
def tiny() -> Qwen3ForCausalLM:
    """`random_model()`: 97 token ids, a context of 64, no end tokens. Not to be changed."""
    return random_model()


@pytest.fixture(scope="session")
def demo() -> tuple[Qwen3ForCausalLM, Tokenizer]:
    """The demo model and its tokenizer. Not to be changed."""
    return mlxqwen.load()


@pytest.fixture(scope="module")
def served(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Iterator[Served]:
    """A server of the demo model; tests of another model or other settings have one of their own."""
    from tests.serving import serving  # the server's libraries are an extra

    with serving(Engine(*demo)) as made:
        yield made


@pytest.fixture(scope="session")
def model(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Qwen3ForCausalLM:
    """The demo model."""
    return demo[0]


@pytest.fixture(scope="session")
def tokenizer(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Tokenizer:
    """The demo model's tokenizer."""
    return demo[1]


@pytest.fixture(scope="session")
def small(tokenizer: Tokenizer) -> tuple[Qwen3ForCausalLM, Tokenizer]:
    """One random layer in the demo's place, and its tokenizer: for what depends on no answer. Not to be changed."""
    return random_model(vocab_size=tokenizer.vocab_size, context=512, layers=1), tokenizer


@pytest.fixture(scope="session")
def babbler(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """Says anything, in the demo's tokens and in 200 ids that its tokenizer has no token for. Not to be changed."""
    return random_model(vocab_size=tokenizer.vocab_size + 200, context=512)
