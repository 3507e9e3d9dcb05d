"""Many threads, one model: who drives, what they get, and what is left of them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import pytest

from mlxqwen import Engine, daemons, load
from mlxqwen.engine.engine import Done
from mlxqwen.engine.request import Request
from mlxqwen.engine.schedulers import scheduler_of
from mlxqwen.engine.token_stream import generate_tokens
from mlxqwen.errors import OptionError
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.text.tokenizer import Tokenizer
from tests.conftest import random_model
from tests.scheduling import alone, asked, ids, new_scheduler, run

SEEDED = SamplingParams(seed=3, temperature=1.5, presence_penalty=0.5)


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@pytest.mark.slow
def test_replies_of_many_threads_are_as_alone(small: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    """8 threads × 20 replies on one engine, of five questions, each with a seed."""
    engine = Engine(*small)
    questions = [[{"role": "user", "content": text}] for text in ("Hello", "1+1?", "Why?", "Count to 3.", "Who?")]
    expected = {(n, seed): engine.chat(questions[n], max_tokens=12, seed=seed) for n in range(5) for seed in range(2)}

    def work(thread: int) -> list[tuple[tuple[int, int], Any]]:
        keys = [((thread + n) % 5, n % 2) for n in range(20)]
        return [(key, engine.chat(questions[key[0]], max_tokens=12, seed=key[1])) for key in keys]

    for told in in_threads(8, work):
        for key, reply in told:
            assert reply == expected[key]


def test_streams_of_many_threads_share_steps() -> None:
    model = random_model(context=512)
    expected = [alone(model, asked([n], 40, sampling=SEEDED)) for n in range(8)]
    begun = threading.Barrier(8)

    def work(thread: int) -> list[int]:
        begun.wait()
        return [token.token for _, token in generate_tokens(model, [thread], sampling=SEEDED, max_tokens=40)]

    assert in_threads(8, work) == expected


def test_each_token_of_an_iterator_may_be_taken_by_another_thread() -> None:
    model = random_model(context=512)
    stream = generate_tokens(model, [1], sampling=SEEDED, max_tokens=30)
    found: list[int] = []

    def take() -> None:
        found.append(next(stream)[1].token)

    for _ in range(30):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    assert found == alone(model, asked([1], 30, sampling=SEEDED))


def test_events_may_be_awaited_in_other_threads(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    """As Starlette and Gradio iterate."""
    engine = Engine(*demo)
    question: list[Any] = [{"role": "user", "content": "Hello"}]
    expected = list(engine.stream(question, max_tokens=20, seed=1))

    async def collect() -> list[Any]:
        events, found = engine.stream(question, max_tokens=20, seed=1), []
        while (event := await asyncio.to_thread(next, events, None)) is not None:
            found.append(event)
        return found

    async def several() -> list[list[Any]]:
        return list(await asyncio.gather(*(collect() for _ in range(4))))

    for found in asyncio.run(several()):
        assert [one for one in found if not isinstance(one, Done)] == expected[:-1]
        assert found[-1].reply == expected[-1].reply  # type: ignore[union-attr]


def test_a_reply_that_one_thread_began_is_ended_by_another() -> None:
    model = random_model(context=512)
    scheduler = new_scheduler(model)
    handle = scheduler.submit(asked([1], 30, sampling=SEEDED))
    first = [handle.next_token().token for _ in range(10)]
    (rest,) = in_threads(1, lambda _: [handle.next_token().token for _ in range(20)])
    assert first + rest == alone(model, asked([1], 30, sampling=SEEDED))


def run_python(script: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")


def test_a_daemon_thread_that_an_error_has_ended_is_given_no_more_work(monkeypatch: pytest.MonkeyPatch) -> None:
    told: SimpleQueue[str] = SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", lambda found: told.put(str(found.exc_value)))
    monkeypatch.setattr(daemons, "_idle", [])

    def fail() -> None:
        raise RuntimeError("broken on purpose")

    for fails in (True, False, True, False):
        daemon = daemons.Daemon(fail if fails else lambda: None)
        daemon.join(60)
        assert not daemon.is_alive()
        if fails:
            assert told.get(timeout=60) == "broken on purpose"
    assert len(daemons._idle) == 1


@needs_proc
def test_fresh_threads_leave_at_most_one_of_the_systems_behind() -> None:
    out = run_python(
        """
        import os, threading, time
        from mlxqwen.engine.token_stream import generate_tokens
        from tests.conftest import random_model

        model = random_model()
        whole = [token.token for _, token in generate_tokens(model, [1], max_tokens=3, sampling=None)]

        def ask():
            assert len(list(generate_tokens(model, [1, 2], max_tokens=2))) == 2

        def fresh(count):
            for _ in range(count):
                thread = threading.Thread(target=ask)
                thread.start()
                thread.join()

        def tasks():  # the system may still be taking down a thread that was joined
            seen = []
            for _ in range(20):
                seen.append(len(os.listdir("/proc/self/task")))
                time.sleep(0.02)
            return min(seen)

        before = tasks()
        fresh(1)
        first = tasks()
        fresh(499)
        print(before, first, tasks(), threading.active_count())
        """
    )
    before, first, after, python = map(int, out.split())
    assert python == 2  # the main one, and the loop's own
    assert after <= first
    assert after - before <= 2  # the loop's own thread, and what MLX has begun for it


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_a_lasting_thread_gives_what_the_work_gives_or_raises(in_main_thread: bool) -> None:
    def fail() -> None:
        raise OptionError("broken on purpose")

    def work() -> None:
        thread = daemons.in_lasting_thread(threading.current_thread)
        assert thread.is_alive()
        assert (thread is threading.main_thread()) == in_main_thread
        assert thread is threading.current_thread() or thread.daemon
        with pytest.raises(OptionError, match="broken on purpose"):
            daemons.in_lasting_thread(fail)

    if in_main_thread:
        work()
    else:
        in_threads(1, lambda _: work())


def test_a_thread_that_loads_a_model_and_asks_it_draws_nothing_of_its_own() -> None:
    """MLX aborts a process that ends as a thread does that has its own generator of random numbers."""

    def state() -> list[Any]:
        keys: Any = mx.random.state
        return [key.tolist() for key in keys]

    def ask() -> None:
        mx.random.seed(7)
        before = state()
        with Engine(*load()) as engine:
            assert engine.chat("12 + 39?", max_tokens=3, sampling={"temperature": 1.0}).content is not None
        assert state() == before

    in_threads(1, lambda _: ask())


def test_a_process_may_end_with_the_threads_that_loaded_its_models() -> None:
    out = run_python(
        """
        import threading
        from mlxqwen import load

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("loaded", flush=True)
        """
    )
    assert out == "loaded\n"


def test_a_plain_iterator_starts_no_thread() -> None:
    before = threading.active_count()
    model = random_model()
    assert len(list(generate_tokens(model, [1], max_tokens=5))) == 5
    assert threading.active_count() == before


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads of the system")
def test_the_loops_thread_goes_on_with_the_next_model() -> None:
    """Of an engine that is closed, and of a model that nobody refers to any more."""
    out = run_python(
        """
        import gc, os, threading, time
        from mlxqwen.engine.engine import Engine
        from mlxqwen.engine.schedulers import close_scheduler, scheduler_of
        from mlxqwen.engine.token_stream import generate_tokens
        from tests.conftest import random_model

        def use(is_closed):
            model = random_model(layers=1)
            scheduler = scheduler_of(model)
            scheduler.driver.start(scheduler)
            assert len(list(generate_tokens(model, [1], max_tokens=2))) == 2
            daemon = scheduler.driver._daemon
            if is_closed:
                close_scheduler(scheduler)
                assert len(list(generate_tokens(model, [1], max_tokens=2))) == 2  # a new scheduler
            del model, scheduler
            gc.collect()
            daemon.join(60)
            assert not daemon.is_alive()

        use(True)
        use(False)
        first = len(os.listdir("/proc/self/task")), threading.active_count()
        for n in range(20):
            use(n % 2 == 0)
        print(*first, len(os.listdir("/proc/self/task")), threading.active_count())
        """
    )
    tasks, python, tasks_after, python_after = map(int, out.split())
    assert (tasks_after, python_after) == (tasks, python)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_requests_behind_a_fork_say_so() -> None:
    out = run_python(
        """
        import os, warnings
        warnings.simplefilter("ignore")
        from mlxqwen.engine.token_stream import generate_tokens
        from mlxqwen import load
        from mlxqwen.errors import OptionError
        from mlxqwen_convert import convert
        from tests.conftest import random_model

        model = random_model()
        stream = generate_tokens(model, [1], max_tokens=5)
        next(stream)
        if os.fork() == 0:
            for ask in (
                lambda: next(stream),
                lambda: list(generate_tokens(model, [1], max_tokens=1)),
                lambda: model(model.model.embed_tokens.weight),
                load,
                lambda: convert("none", "none"),
            ):
                try:
                    ask()
                    print("no error", flush=True)
                except OptionError as error:
                    print(str(error).splitlines()[0], flush=True)
            os._exit(0)
        os.wait()
        print(len(list(stream)), flush=True)
        """
    )
    *child, parent = out.splitlines()
    assert parent == "4"
    assert len(child) == 5
    for line in child:
        assert line.startswith("engine: found in a forked process, expected one of its own")


def test_cancelling_from_another_thread_ends_a_waiting_reader() -> None:
    model = random_model(context=512)
    scheduler = new_scheduler(model)
    run(scheduler, [scheduler.submit(asked([1], 1))])  # this thread drives
    handle = scheduler.submit(asked([1], 400))

    def read() -> list[int]:
        found = []
        while True:
            try:
                found.append(handle.next_token().token)
            except StopIteration:
                return found
            if len(found) == 5:
                five.set()

    five = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        assert five.wait(60)
        scheduler.cancel(handle)
        found = reader.result(timeout=60)
    assert 5 <= len(found) < 400
    assert found == alone(model, asked([1], 400))[: len(found)]


def test_closing_from_another_thread_ends_readers_with_an_error() -> None:
    model = random_model(context=512)
    scheduler = scheduler_of(model)
    handles = [scheduler.submit(asked([n], 400)) for n in range(3)]
    started = threading.Barrier(4)

    def read(place: int) -> BaseException | None:
        handles[place].next_token()
        started.wait()
        try:
            while True:
                handles[place].next_token()
        except (OptionError, StopIteration) as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read, place) for place in range(3)]
        started.wait()
        scheduler.close()
        errors: Sequence[Any] = [reader.result(timeout=60) for reader in readers]
    for error in errors:
        assert "closed" in str(error)


def test_requests_that_race_with_a_close_all_end() -> None:
    for _ in range(10):
        model = random_model()
        scheduler = new_scheduler(model)
        go = threading.Barrier(5)

        def ask(n: int, scheduler: Any = scheduler, go: Any = go) -> str:
            go.wait()
            try:
                handle = scheduler.submit(asked([n], 8))
                return str(len(ids(iter(handle.next_token, None))))
            except StopIteration:
                return "over"
            except OptionError as error:
                return str(error)

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask, n) for n in range(4)]
            go.wait()
            scheduler.close()
            for one in asking:
                assert one.result(timeout=60) == "over" or "close" in one.result()


def test_a_listener_that_fails_ends_no_reply(tiny: Qwen3ForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("a listener's own")

    scheduler = new_scheduler(tiny)
    told = threading.Event()
    scheduler.driver.listen(fail)
    scheduler.driver.listen(told.set)
    scheduler.driver.start(scheduler)
    handle = scheduler.submit(Request(prompt=(1, 2, 3), max_tokens=5))
    until = time.monotonic() + 30
    while not handle.is_over and time.monotonic() < until:
        handle.poll()  # nobody waits in `next_token`, which would start another thread
        time.sleep(0.001)
    assert handle.token_count == 5
    assert told.is_set()
    assert "a listener failed" in caplog.text
    scheduler.close()


def test_listeners_are_told_of_each_step_of_the_daemon(tiny: Qwen3ForCausalLM) -> None:
    scheduler = new_scheduler(tiny)
    told: list[int] = []
    stop = scheduler.driver.listen(lambda: told.append(scheduler.steps))
    scheduler.driver.start(scheduler)
    handle = scheduler.submit(Request(prompt=(1, 2, 3), max_tokens=5))
    until = time.monotonic() + 30
    while not handle.is_over and time.monotonic() < until:
        while handle.poll() is not None:  # nobody waits in `next_token`
            pass
        time.sleep(0.001)
    assert handle.is_over
    assert handle.token_count == len(handle.tokens) == 5
    assert len({*told}) >= 5
    stop()
    count = len(told)
    scheduler.driver.wake()
    assert len(told) == count
    scheduler.close()
